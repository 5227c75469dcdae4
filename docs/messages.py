"""Keep chapter 8 complete: every message that mili raises on purpose has an entry there, and nothing else has.

The messages are read from the source as templates, in which `…` stands for what varies:

    raise ConfigError(f"port must be 0 to 65535, got {self.port}")    ->    port must be 0 to 65535, got …

and an entry of the chapter is a list item of one or more templates, a cause and a remedy:

    - `port must be 0 to 65535, got …`\\
      There are no other ports.\\
      → Give one of those; 0 lets the system choose.

    python docs/messages.py    # name what is missing and what is left over; exit 1 if anything is

Knows Python's syntax and the names of the exceptions; imports nothing of mili. Invariant: only a message that is wholly
another's text (`str(error)`) is passed over.
"""

import ast
import gc
import itertools
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SOURCE = ROOT / "src" / "mili"
CHAPTER = ROOT / "docs" / "08_troubleshooting.md"

VARIES = "…"
# Constructors besides the classes of errors.py, and which of their arguments is the message.
_CONSTRUCTORS = {"ApiError": 1, "PydanticCustomError": 1, "BadLine": 2, "BadParameter": 0, "UsageError": 0}
_IN_BODIES = {"ValueError": 0}  # where request bodies are declared, pydantic makes a 400 of it
_CODES = {"BadLine": 1}  # elsewhere it is the keyword `code`
_SPAN = re.compile(r"(`+) ?((?:(?!\1).)+?) ?\1", re.S)  # one code span


def messages(source: Path = SOURCE) -> dict[str, str]:
    """The template of every message that the modules under `source` raise, and where it is raised first."""
    errors = _parsed(source / "errors.py")
    constructors = {**{node.name: 0 for node in errors.body if isinstance(node, ast.ClassDef)}, **_CONSTRUCTORS}
    found: dict[str, str] = {}
    for path, module in _modules(source):
        for call in module.calls:
            position = (constructors | (_IN_BODIES if path.name.startswith("protocol") else {})).get(_name(call))
            if position is not None and len(call.args) > position:
                for text in _most_general([_tidy(text) for text in module.texts(call.args[position])]):
                    found.setdefault(text, f"{path.relative_to(source)}:{call.lineno}")
    return found


def codes(source: Path = SOURCE) -> set[str]:
    """Every value of `code` in an error that the server or a batch answers with."""
    found: set[str] = set()
    for _, module in _modules(source):
        for call in module.calls:
            values = [keyword.value for keyword in call.keywords if _name(call) == "ApiError" and keyword.arg == "code"]
            if _name(call) in _CODES:
                values.append(call.args[_CODES[_name(call)]])
            found.update(itertools.chain.from_iterable(map(module.texts, values)))
    return found - {VARIES}


def entries(chapter: str) -> dict[str, tuple[str, str]]:
    """Message template -> cause and remedy. Raises ValueError for an entry of another form, or there twice."""
    found: dict[str, tuple[str, str]] = {}
    for item in re.findall(r"^- (`.*?)(?=\n\n|\n- |\n?\Z)", chapter, re.M | re.S):
        *spans, cause, remedy = (_tidy(part) for part in item.split("\\\n"))
        if not spans or _SPAN.fullmatch(cause) or not remedy.startswith("→ "):
            raise ValueError(f"an entry needs its messages, a cause, and a remedy after an arrow: {item}")
        for span in spans:
            match = _SPAN.fullmatch(span)
            if match is None or match[2] in found:
                raise ValueError(f"not one message as code, or there already: {span}")
            found[match[2]] = cause, remedy
    return found


def _parsed(path: Path) -> ast.Module:
    """The syntax tree; Python 3.11 takes a garbage collection at the wrong moment for a fault of its own."""
    gc.disable()
    try:
        return ast.parse(path.read_text(encoding="utf-8"))
    finally:
        gc.enable()


def _modules(source: Path) -> Iterator[tuple[Path, "_Module"]]:
    for path in sorted(source.rglob("*.py")):
        yield path, _Module(_parsed(path))


class _Module:
    """The syntax tree of a module, and what its messages are made of: constants, local names, parameters, helpers."""

    def __init__(self, tree: ast.Module) -> None:
        nodes = list(ast.walk(tree))
        functions = [node for node in nodes if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]
        self.calls = [node for node in nodes if isinstance(node, ast.Call)]
        self._helpers = {function.name: function for function in functions}
        self._scopes = {inner: function for function in functions for inner in ast.walk(function)}  # innermost last

    def texts(self, node: ast.expr) -> list[str]:
        """What an expression may say, with VARIES for what is not known before it runs."""
        match node:
            case ast.Constant(value=str(text)):
                return [text]
            case ast.JoinedStr(values=parts):
                return ["".join(texts) for texts in itertools.product(*map(self.texts, parts))]
            case ast.FormattedValue(value=ast.Name(id=name) as value) if self._is_text(name, node):
                return self.texts(value)
            case ast.IfExp(body=one, orelse=other):
                return self.texts(one) + self.texts(other)
            case ast.Name(id=name) if node in self._scopes:
                return self._texts_of_name(name, self._scopes[node])
            case ast.Call(func=ast.Name(id=name)) if name in self._helpers:
                returned = [inner.value for inner in ast.walk(self._helpers[name]) if isinstance(inner, ast.Return)]
                return [text for value in returned if value is not None for text in self.texts(value)]
        return [VARIES]

    def _is_text(self, name: str, node: ast.expr) -> bool:
        """Whether every binding of a local name is text written out, which is worth putting into a template."""
        values = self._bindings(name, self._scopes[node]) if node in self._scopes else []
        return bool(values) and all(isinstance(value, ast.Constant | ast.JoinedStr | ast.IfExp) for value in values)

    def _texts_of_name(self, name: str, scope: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
        """What a parameter is given by the calls in this module, or what a local name is bound to."""
        parameters = [argument.arg for argument in scope.args.args if argument.arg != "self"]
        if name in parameters:
            position = parameters.index(name)
            values = [c.args[position] for c in self.calls if _name(c) == scope.name and len(c.args) > position]
        else:
            values = self._bindings(name, scope)
        return list(dict.fromkeys(text for value in values for text in self.texts(value))) or [VARIES]

    @staticmethod
    def _bindings(name: str, scope: ast.AST) -> list[ast.expr]:
        assigned = [inner for inner in ast.walk(scope) if isinstance(inner, ast.Assign)]
        return [a.value for a in assigned if any(isinstance(t, ast.Name) and t.id == name for t in a.targets)]


def _name(call: ast.Call) -> str:
    match call.func:
        case ast.Name(id=name) | ast.Attribute(attr=name):
            return name
    return ""


def _most_general(texts: list[str]) -> list[str]:
    """Of the texts of one message those that say something, without the ones that others stand for."""
    texts = [text for text in texts if re.search(r"\w", text)]
    patterns = {text: ".+".join(map(re.escape, text.split(VARIES))) for text in texts}
    return [t for t in texts if not any(other != t and re.fullmatch(patterns[other], t) for other in texts)]


def _tidy(text: str) -> str:
    """One line, and one VARIES where several meet; pydantic's own placeholders vary too."""
    text = re.sub(r"\{\w+\}", VARIES, " ".join(text.split()))
    return re.sub(rf"{VARIES}({VARIES}| )*{VARIES}", VARIES, text)


def main() -> int:
    """Compare source and chapter; returns the exit status."""
    raised, told = messages(), entries(CHAPTER.read_text(encoding="utf-8"))
    for text in sorted(raised.keys() - told.keys()):
        print(f"no entry ({raised[text]}): {text}")
    for text in sorted(told.keys() - raised.keys()):
        print(f"no such message: {text}")
    return int(raised.keys() != told.keys())


if __name__ == "__main__":
    sys.exit(main())
