"""The floor of a step, against counts made by hand and against every step of a run added up."""

import pytest

from mili.cli.roofline import Ceilings, Work, decode_step, generation, prefill
from mili.config import ModelConfig, RopeConfig

SMALL = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16}
LARGE = {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36, "num_attention_heads": 32}


def model(tied: bool, **sizes: int) -> ModelConfig:
    return ModelConfig(
        vocab_size=151_936,
        num_key_value_heads=8,
        head_dim=128,
        rms_norm_eps=1e-6,
        rope=RopeConfig(theta=1e6),
        max_position_embeddings=40_960,
        tie_word_embeddings=tied,
        attention_bias=False,
        dtype="bfloat16",
        eos_token_ids=frozenset(),
        **sizes,
    )


QWEN3_0_6B, QWEN3_8B = model(True, **SMALL), model(False, **LARGE)


def test_a_decode_step_of_the_published_sizes() -> None:
    """596 million parameters, tied; 8.19 billion, of which 0.62 billion are an input embedding read row by row."""
    one = decode_step(QWEN3_0_6B, "bfloat16", 1, 512)
    assert one.bytes == pytest.approx(2 * 596.05e6 + 512 * 114_688, rel=1e-4)
    assert one.flops == pytest.approx(2 * 595.98e6 + 4 * 28 * 2048 * 512, rel=1e-3)
    eight = decode_step(QWEN3_8B, "bfloat16", 64, 512)
    assert eight.bytes == pytest.approx(2 * (8.1907e9 - 0.6223e9) + 64 * 512 * 147_456, rel=1e-3)
    assert decode_step(QWEN3_8B, "float32", 1, 512).bytes == pytest.approx(
        2 * decode_step(QWEN3_8B, "bfloat16", 1, 512).bytes
    )


def test_floors_at_a_known_ceiling() -> None:
    """4.3 TB/s and 790 TFLOP/s: 3,437 tokens a second alone, 829 thousand prompt tokens in a batch of 64."""
    ceilings = Ceilings(4.3e12, 790e12)
    assert 1 / decode_step(QWEN3_0_6B, "bfloat16", 1, 512).seconds(ceilings) == pytest.approx(3437, rel=0.002)
    assert 64 / decode_step(QWEN3_0_6B, "bfloat16", 64, 512).seconds(ceilings) == pytest.approx(55_500, rel=0.01)
    prompts = prefill(QWEN3_0_6B, "bfloat16", [512] * 64).seconds(ceilings)
    # 840 thousand if all rows went through all of the last layer
    assert 64 * 512 / prompts == pytest.approx(840e3 * 28 / (28 - 0.86), rel=0.01)


def test_the_slower_of_memory_and_matrix_unit_decides() -> None:
    work = Work(bytes=100, flops=1000)
    assert work.seconds(Ceilings(10, 1000)) == 10
    assert work.seconds(Ceilings(1000, 10)) == 100
    assert work.seconds(Ceilings(10, None)) == 10
    assert Work(1, 2) + Work(3, 4) == Work(4, 6)


def test_generation_is_its_steps() -> None:
    """Requests of one length in step: the sum of the decode steps, to the bytes of a few embedding rows."""
    steps = [decode_step(QWEN3_0_6B, "bfloat16", 4, 100 + i) for i in range(1, 10)]
    all_at_once = generation(QWEN3_0_6B, "bfloat16", [(100, 10)] * 4, max_batch=4)
    assert all_at_once.flops == pytest.approx(sum(step.flops for step in steps))
    assert all_at_once.bytes == pytest.approx(sum(step.bytes for step in steps))
    two_by_two = generation(QWEN3_0_6B, "bfloat16", [(100, 10)] * 4, max_batch=2)
    assert two_by_two.flops == all_at_once.flops
    assert two_by_two.bytes == pytest.approx(all_at_once.bytes + 9 * 2 * 596.05e6, rel=1e-4)


def test_a_prompt_costs_what_its_rows_would_one_by_one_but_for_the_last_layer() -> None:
    rows = [decode_step(QWEN3_8B, "bfloat16", 1, i) for i in range(1, 31)]
    head = 2 * 4096 * 151_936
    last = 2 * (4096 * 2 * 4096 + 3 * 4096 * 12288)  # query, output and MLP of a row, whose keys and values are needed
    left_out = 29 * last + 4 * 4096 * sum(range(1, 30))
    whole = sum(row.flops - head for row in rows) + head
    assert prefill(QWEN3_8B, "bfloat16", [30]).flops == pytest.approx(whole - left_out)
