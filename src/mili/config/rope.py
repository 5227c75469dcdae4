"""Rotary-embedding settings: every spelling found in the wild, read into one frozen object.

Knows the fields and their defaults as transformers reads them; computes nothing (``mili.models.rope`` does).
Invariant: a ``RopeConfig`` describes either the plain rotation or static YaRN; anything else was refused here.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from mili.config._fields import Fields
from mili.errors import ConfigError, UnsupportedModelError

ROPE_TYPES = ("default", "yarn")
_COMMON_KEYS = ("rope_type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings")
_YARN_KEYS = ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim", "truncate")
_KEYS = frozenset(_COMMON_KEYS + _YARN_KEYS)


@dataclass(frozen=True, slots=True)
class RopeConfig:
    """Parameters of the rotary embedding; the YaRN ones are meaningful only when ``type`` is "yarn"."""

    theta: float
    type: str = "default"  # one of ROPE_TYPES
    factor: float = 1.0  # how many times longer the context becomes
    original_max_position_embeddings: int = 0  # context length before YaRN
    attention_factor: float | None = None  # None: derived from factor, mscale and mscale_all_dim
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    mscale: float | None = None
    mscale_all_dim: float | None = None
    truncate: bool = True  # round the correction range to whole dimensions


def normalise(values: Mapping[str, Any], source: str) -> dict[str, Any]:
    """Gather ``rope_theta``, ``rope_scaling`` and ``rope_parameters`` of one object into one flat dict.

    The older ``type`` becomes ``rope_type``. Two spellings that disagree are a ConfigError: no order of preference is
    right for both writers.
    """
    fields = Fields(values, source)
    merged: dict[str, Any] = {}
    for origin in ("rope_parameters", "rope_scaling", "rope_theta"):
        if origin == "rope_theta":
            found = {"rope_theta": fields.get(origin)}
        else:
            found = dict(fields.mapping(origin))
            legacy = found.pop("type", None)
            if legacy is not None and found.setdefault("rope_type", legacy) != legacy:
                raise ConfigError(f"{source}: {origin} has both type={legacy!r} and rope_type={found['rope_type']!r}")
        for key, value in found.items():
            if value is not None and merged.setdefault(key, value) != value:
                raise ConfigError(f"{source}: {key} is given twice, {merged[key]!r} and {value!r} (in {origin})")
    return merged


def parse_rope(values: Mapping[str, Any], max_position_embeddings: int, source: str) -> RopeConfig:
    """Validate what :func:`normalise` gathered. Source of names and defaults: transformers ``modeling_rope_utils``."""
    rope = Fields(values, f"{source} (rope_parameters/rope_scaling)")
    rope_type = rope.string("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise UnsupportedModelError(f"{source}: rope_type {rope_type!r} is not supported; mili has {ROPE_TYPES}")
    if unknown := sorted(set(values) - _KEYS):
        raise UnsupportedModelError(f"{source}: rope field {unknown[0]}={values[unknown[0]]!r} is not supported")
    if rope.number("partial_rotary_factor", 1.0) != 1.0:
        raise UnsupportedModelError(
            f"{source}: partial_rotary_factor {values['partial_rotary_factor']!r} is not supported, only 1.0"
        )
    theta = rope.number("rope_theta", minimum=1.0)
    if rope_type == "default":
        return RopeConfig(theta)
    original = rope.integer("original_max_position_embeddings", max_position_embeddings)
    # YaRN without a factor means the ratio of the two lengths, which says something only when both are written.
    ratio = max_position_embeddings / original if rope.get("original_max_position_embeddings") else None
    # A zero in an optional field means "use the default", as in transformers.
    beta_fast = rope.number("beta_fast", 32.0, above=False) or 32.0
    beta_slow = rope.number("beta_slow", 1.0, above=False) or 1.0
    if beta_fast < beta_slow:
        raise ConfigError(f"{source}: beta_fast {beta_fast:g} must be at least beta_slow {beta_slow:g}")
    optional = {
        name: rope.number(name, above=False) if rope.get(name) is not None else None
        for name in ("attention_factor", "mscale", "mscale_all_dim")
    }
    return RopeConfig(
        theta,
        rope_type,
        factor=rope.number("factor", ratio, minimum=1.0, above=False),
        original_max_position_embeddings=original,
        beta_fast=beta_fast,
        beta_slow=beta_slow,
        truncate=rope.boolean("truncate", True),
        **optional,
    )
