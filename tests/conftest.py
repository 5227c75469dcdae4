"""Fixtures shared by the suite. The bundled model in float32 and in bfloat16 are the only graphs most tests compile."""

from collections.abc import Iterator

import pytest

from mili import LLM


@pytest.fixture(scope="session")
def bundled_f32() -> Iterator[LLM]:
    """The bundled model in float32 on the CPU: bit-exact comparisons and transformers' reference outputs."""
    with LLM(device="cpu", dtype="float32") as llm:
        yield llm


@pytest.fixture(scope="session")
def bundled_bf16() -> Iterator[LLM]:
    """The bundled model as users run it on the CPU."""
    with LLM(device="cpu") as llm:
        yield llm
