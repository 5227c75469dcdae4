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

from max import driver
from max.driver import CPU, Accelerator
from max.engine import InferenceSession

from mili.compiler import Target, artefact_facts, artefact_path, compile_step, export
from mili.config import EngineConfig, ModelConfig
from mili.errors import ConfigError
from mili.models.hub import resolve_model

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
    """Compile `model` into `folder` for `LLM(model, compiled=folder)` and return the file.

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
    if target == "cpu":
        device: driver.Device = CPU()
        made_for = Target.of(device)
    elif _ARCHITECTURE.fullmatch(target):
        driver.set_virtual_device_count(1)
        driver.set_virtual_device_api("cuda")
        driver.set_virtual_device_target_arch(target)
        device, made_for = Accelerator(), Target("gpu", target)
    else:
        raise ConfigError(f"target must be 'cpu' or an NVIDIA architecture such as 'sm_90a', got {target!r}")
    facts = artefact_facts(shape, dtype, config.page_size, made_for, config.batch_invariant)
    path = artefact_path(facts, folder)
    log.info("compiling the %d-layer network for %s", shape.num_hidden_layers, target)
    session = InferenceSession(devices=[device])
    compiled = compile_step(session, shape, dtype, config.page_size, made_for, config.batch_invariant)
    export(compiled, path)
    path.with_suffix(".json").write_text(json.dumps(facts, indent=1) + "\n")
    return path
