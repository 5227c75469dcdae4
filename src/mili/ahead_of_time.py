"""Compile a model's graph before, and elsewhere than, it runs: what `mili compile` does.

Reads JSON files only, no weights; a GPU target needs no GPU. Invariant: beside every graph lies a note of all it was
made from, so that a folder that does not fit can say why.
"""

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from max.driver import CPU
from max.engine import InferenceSession

from mili.compiler import artefact_facts, artefact_paths, export, target_of
from mili.config import EngineConfig, ModelConfig
from mili.errors import ConfigError
from mili.models.hub import resolve_model
from mili.step_compiler import Target, compile_step, declare_device

log = logging.getLogger(__name__)

_ARCHITECTURE = re.compile(r"sm_\d+a?")


def compile_ahead(
    model: str | Path | None,
    folder: Path,
    target: str,
    config: EngineConfig,
    *,
    hf_overrides: Mapping[str, Any] | None = None,
    revision: str | None = None,
) -> Path:
    """Compile `model` into `folder` for `LLM(model, compiled=folder)` and return the note beside its graphs.

    To be called before anything else in the process has looked for a GPU: a target that is not here is declared as a
    virtual device, which lasts as long as the process.

    Args:
        model: As for `LLM`; its config.json is read.
        folder: Made if it is not there; graphs for other models and targets may lie in it.
        target: "cpu" for this machine's instruction set, or a GPU's architecture such as "sm_90a".
        config: Its dtype, page_size and batch_invariant matter.
        hf_overrides: As for `LLM`.
        revision: As for `LLM`.

    Raises:
        ConfigError: The target or the model's config is not one mili knows.
    """
    shape = ModelConfig.from_pretrained(resolve_model(model, revision, weights=False), hf_overrides)
    dtype = config.resolve_dtype(shape)
    if target != "cpu" and not _ARCHITECTURE.fullmatch(target):
        raise ConfigError(f"target must be 'cpu' or an NVIDIA architecture such as 'sm_90a', got {target!r}")
    made_for = target_of(CPU()) if target == "cpu" else Target("gpu", target)
    facts = artefact_facts(shape, dtype, config.page_size, made_for, config.batch_invariant)
    paths = artefact_paths(facts, folder)
    log.info("compiling the %d-layer network for %s", shape.num_hidden_layers, target)
    session = InferenceSession(devices=[declare_device(made_for)])
    compiled = compile_step(session, shape, dtype, config.page_size, made_for, config.batch_invariant)
    export(compiled, paths)
    paths.note.write_text(json.dumps(facts, indent=1) + "\n")
    return paths.note
