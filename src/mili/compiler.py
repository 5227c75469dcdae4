"""From a model's config to the compiled graphs of a step, through a cache on disk.

Knows what they depend on and how MAX exports and reads them; knows no weights and runs nothing.
Invariant: a cached artefact is used only under a key made of everything that went into it (mili's kernels and graph
code, MAX's version, the config's shapes, dtype, page size, target), because MAX itself matches an artefact by nothing
but its path.
"""

import hashlib
import json
import logging
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from max import driver
from max.engine import InferenceSession
from max.engine.api import CompiledModel, read

from mili.config import ModelConfig
from mili.errors import ConfigError
from mili.ops._call import kernels_path
from mili.step_compiler import CompiledStep, Target, compile_step

__all__ = ["artefact_facts", "artefact_key", "artefact_paths", "cache_folder", "compiled_step", "export", "target_of"]

log = logging.getLogger(__name__)

# What the graph reads of a config; anything else may change without a new artefact.
_GRAPH_FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
)


@dataclass(frozen=True, slots=True)
class ArtefactPaths:
    """Where a compiled step is or will be."""

    forward: Path
    sampler: Path
    note: Path  # all that went into it, beside what `mili compile` makes

    @property
    def are_there(self) -> bool:
        """Whether both graphs are."""
        return self.forward.is_file() and self.sampler.is_file()


def target_of(device: driver.Device) -> Target:
    """The target that `device` is."""
    return Target("cpu", _host_fingerprint()) if device.is_host else Target("gpu", device.architecture_name)


def cache_folder() -> Path:
    """Where compiled graphs are kept: $MILI_CACHE_DIR, else `mili` in $XDG_CACHE_HOME or ~/.cache."""
    if folder := os.environ.get("MILI_CACHE_DIR"):
        return Path(folder)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mili"


def artefact_facts(
    config: ModelConfig, dtype: str, page_size: int, target: Target, batch_invariant: bool = False
) -> dict[str, Any]:
    """Everything a compiled step depends on."""
    # --8<-- [start:key]
    return {
        "max": version("max"),
        "sources": _sources_digest(),
        "config": {name: getattr(config, name) for name in _GRAPH_FIELDS},
        "dtype": dtype,
        "page_size": page_size,
        "batch_invariant": batch_invariant and target.kind == "gpu",  # on the CPU every graph is
        "target": asdict(target),
    }


def artefact_key(facts: dict[str, Any]) -> str:
    """Hex digest of `artefact_facts`."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]
    # --8<-- [end:key]


def artefact_paths(facts: dict[str, Any], folder: Path | None = None) -> ArtefactPaths:
    """Where the compiled step is or will be, in the cache unless `folder` is given."""
    stem = str((folder or cache_folder()) / f"qwen3-{artefact_key(facts)}")
    return ArtefactPaths(Path(f"{stem}-forward.mef"), Path(f"{stem}-sampler.mef"), Path(f"{stem}.json"))


def compiled_step(
    session: InferenceSession,
    config: ModelConfig,
    dtype: str,
    page_size: int,
    target: Target,
    folder: Path | None = None,
    batch_invariant: bool = False,
) -> CompiledStep:
    """Return the compiled graphs of one step, from the cache if they are there; compile and keep them otherwise.

    An unreadable artefact is compiled anew. A cache folder that cannot be written costs the next start, not this one.
    With `folder`, made by `mili compile`, nothing is compiled: ConfigError says what its graphs were made for instead.
    """
    facts = artefact_facts(config, dtype, page_size, target, batch_invariant)
    paths = artefact_paths(facts, folder)
    if folder is not None and not paths.are_there:
        raise ConfigError(_mismatch(folder, facts))
    if paths.are_there:
        path = paths.forward
        try:
            forward = read(path)
            path = paths.sampler
            return CompiledStep(forward, read(path))
        except Exception as error:
            if folder is not None:
                raise ConfigError(f"{path} is not readable: compile it again ({error})") from error
            log.warning("compiling again: %s is not readable (%s)", path, error)
    kept_in = paths.forward.parent
    log.info("compiling the %d-layer network for %s (once; kept in %s)", config.num_hidden_layers, target.kind, kept_in)
    compiled = compile_step(session, config, dtype, page_size, target, batch_invariant)
    try:
        export(compiled, paths)
    except OSError as error:
        log.warning("the compiled graphs could not be kept in %s: %s", kept_in, error)
    return compiled


def _mismatch(folder: Path, wanted: dict[str, Any]) -> str:
    """What `folder` has instead of a graph made for `wanted`: the one that differs least, and in what."""
    notes = [json.loads(path.read_text()) for path in sorted(folder.glob("qwen3-*.json"))]
    if not notes:
        return f"compiled={str(folder)!r} holds no compiled graph: make one with `mili compile MODEL -o {folder}`"

    def differences(made: dict[str, Any]) -> list[str]:
        found = []
        for name, value in wanted.items():
            if isinstance(value, dict):
                found += [
                    f"{k} {made[name].get(k)!r} (wanted {v!r})" for k, v in value.items() if made[name].get(k) != v
                ]
            elif made.get(name) != value:
                found.append(f"{name} {made.get(name)!r} (wanted {value!r})")
        return found

    least = min(map(differences, notes), key=len)
    if not least:  # made for this, but a file is gone
        return f"compiled={str(folder)!r} holds only a part of its compiled graphs: copy or compile it again"
    return f"compiled={str(folder)!r} was made for {', '.join(least)}: compile it again, with this mili, for this model"


def export(compiled: CompiledStep, paths: ArtefactPaths) -> None:
    """Write both graphs to their places."""
    paths.forward.parent.mkdir(parents=True, exist_ok=True)
    _export(compiled.sampler, paths.sampler)
    _export(compiled.forward, paths.forward)


def _export(compiled: CompiledModel, path: Path) -> None:
    """Write beside the final name and rename, so that a reader never sees half a file."""
    handle, name = tempfile.mkstemp(dir=path.parent, suffix=".tmp")
    os.close(handle)
    try:
        compiled.export_mef(name)
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)


@cache
def _sources_digest() -> str:
    """Digest of the kernels and of the Python that builds the graph."""
    package = Path(__file__).parent
    files = [*kernels_path().glob("*.mojo"), *(package / "ops").glob("*.py"), *(package / "models").glob("qwen3*.py")]
    digest = hashlib.sha256()
    for file in sorted(files, key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()


@cache
def _host_fingerprint() -> str:
    """Architecture and instruction-set flags of this CPU: code compiled for it may not run on another."""
    facts = [os.uname().machine]
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        facts += sorted({line for line in lines if line.startswith(("flags", "Features", "model\t", "cpu family"))})
    except OSError:
        facts.append(os.uname().version)
    return hashlib.sha256("\n".join(facts).encode()).hexdigest()[:16]
