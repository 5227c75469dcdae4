"""Planted bugs: a copy of a module with one piece of its source replaced.

The text must occur exactly once, so that a change to the module cannot turn a planted bug into no bug unnoticed.
"""

from pathlib import Path
from types import ModuleType


def mutant(module: ModuleType, old: str, new: str) -> ModuleType:
    """A fresh, unregistered copy of `module` in which the source text `old` reads `new`."""
    assert module.__file__ is not None
    source = Path(module.__file__).read_text(encoding="utf-8")
    assert source.count(old) == 1, f"{old!r} occurs {source.count(old)} times in {module.__name__}"
    return _execute(module, source.replace(old, new))


def copy_with(module: ModuleType, **names: object) -> ModuleType:
    """A fresh, unregistered copy of `module` that uses `names` in place of its own imports of those names."""
    assert module.__file__ is not None
    copy = _execute(module, Path(module.__file__).read_text(encoding="utf-8"))
    assert names.keys() <= copy.__dict__.keys()
    copy.__dict__.update(names)
    return copy


def _execute(module: ModuleType, source: str) -> ModuleType:
    copy = ModuleType(module.__name__)  # the same name: dataclasses look annotations up by it
    exec(compile(source, f"<copy of {module.__name__}>", "exec"), copy.__dict__)
    return copy
