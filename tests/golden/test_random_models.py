"""Small random Qwen3 networks against transformers in float32, from files on disk to log-probabilities.

Each network costs a compile, so four cover the list: 1, 2, 4 and 8 query heads per KV head; both head dims; tied
embeddings and not; attention biases; YaRN; odd vocabularies. Token by token along mili's own greedy choice, so that one
near-tie does not end the comparison.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import tokenizers
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel

from mili import LLM, SamplingParams
from mili.outputs import RequestOutput
from support.checkpoints import write_transformers_checkpoint

TOLERANCE = 1e-3  # of a log-probability
TIE = 1e-4  # closer than this, either of two tokens is the likeliest
NEW_TOKENS = 12
PROMPT_LENS = (1, 16, 37, 150)  # one token; a whole page; part of one; past the YaRN networks' original context


def yarn(**more: Any) -> dict[str, Any]:
    scaling = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 64}
    return {"rope_parameters": {**scaling, **more}}


NETWORKS: dict[str, dict[str, Any]] = {
    "1:1, 64, tied, one layer": {
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "vocab_size": 101,
    },
    "2:1, 128, bias": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "attention_bias": True,
        "vocab_size": 128,
        "intermediate_size": 98,
    },
    "4:1, 64, YaRN": {
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 64,
        "tie_word_embeddings": False,
        "vocab_size": 257,
        "hidden_size": 78,
        **yarn(),
    },
    "8:1, 128, tied, bias, YaRN": {
        "num_attention_heads": 8,
        "num_key_value_heads": 1,
        "head_dim": 128,
        "tie_word_embeddings": True,
        "attention_bias": True,
        "vocab_size": 333,
        **yarn(attention_factor=0.9, beta_fast=16.0, beta_slow=2.0),
    },
}


@pytest.fixture(scope="module", params=NETWORKS.values(), ids=NETWORKS)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LLM, Any]]:
    """One network in mili and in transformers."""
    folder = tmp_path_factory.mktemp("model")
    model = write_transformers_checkpoint(folder, seed=5, max_position_embeddings=256, **request.param)
    # Embeddings small against what the layers add: else a tied network only repeats its last token.
    model.model.embed_tokens.weight.data.mul_(0.125)
    model.save_pretrained(folder)
    alphabet = sorted(ByteLevel.alphabet())[: request.param["vocab_size"]]
    tokenizer = tokenizers.Tokenizer(BPE({character: i for i, character in enumerate(alphabet)}, []))
    tokenizer.decoder = ByteLevelDecoder()
    tokenizer.save(str(folder / "tokenizer.json"))  # LLM wants one; prompts and outputs here are token ids
    with LLM(folder, device="cpu", dtype="float32", kv_cache_memory_bytes=2**24) as llm:
        yield llm, model


@pytest.fixture(scope="module")
def outputs(pair: tuple[LLM, Any]) -> list[RequestOutput]:
    """All prompts at once, greedy."""
    llm, model = pair
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, model.config.vocab_size, length).tolist() for length in PROMPT_LENS]
    params = SamplingParams(
        temperature=0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=20, prompt_logprobs=5, detokenize=False
    )
    return llm.generate(prompts, params, use_tqdm=False)


def logprobs_of(model: Any, token_ids: list[int]) -> np.ndarray:
    """[tokens, V] float64, from transformers."""
    import torch

    with torch.no_grad():
        logits = model(torch.tensor([token_ids])).logits[0]
    return torch.log_softmax(logits.double(), dim=-1).numpy()


def check_top(entry: dict[int, Any], expected: np.ndarray, count: int) -> None:
    """Each reported log-probability is right, and the reported tokens are the likeliest."""
    for token, reported in entry.items():
        assert reported.logprob == pytest.approx(expected[token], abs=TOLERANCE)
    best = sorted((reported.logprob for reported in entry.values()), reverse=True)[:count]
    np.testing.assert_allclose(best, np.sort(expected)[::-1][:count], rtol=0, atol=TOLERANCE)


def test_greedy_tokens_and_their_logprobs(pair: tuple[LLM, Any], outputs: list[RequestOutput]) -> None:
    decided = 0
    for output in outputs:
        completion = output.outputs[0]
        token_ids = list(completion.token_ids)
        assert len(token_ids) == NEW_TOKENS
        expected = logprobs_of(pair[1], output.prompt_token_ids + token_ids[:-1])[-NEW_TOKENS:]
        for token, entry, row in zip(token_ids, completion.logprobs, expected, strict=True):
            second, first = np.sort(row)[-2:]
            if first - second > TIE:
                assert token == row.argmax()
                decided += 1
            check_top(entry, row, 20)
    assert decided > 0.9 * NEW_TOKENS * len(outputs)


def test_prompt_logprobs(pair: tuple[LLM, Any], outputs: list[RequestOutput]) -> None:
    for output in outputs:
        expected = logprobs_of(pair[1], output.prompt_token_ids)
        assert output.prompt_logprobs[0] is None
        assert len(output.prompt_logprobs) == len(output.prompt_token_ids)
        for token, entry, row in zip(output.prompt_token_ids[1:], output.prompt_logprobs[1:], expected, strict=False):
            assert token in entry
            check_top(entry, row, 5)


def test_outputs_are_not_all_alike(outputs: list[RequestOutput]) -> None:
    """A network that always says the same would hide most mistakes."""
    assert len({token for output in outputs for token in output.outputs[0].token_ids}) > 5


def test_every_weight_and_the_rotary_table_show_in_the_log_probabilities(pair: tuple[LLM, Any]) -> None:
    """The comparison can fail: without any one of them transformers itself ends far outside the tolerance."""
    _, model = pair
    token_ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 37).tolist()
    whole = logprobs_of(model, token_ids)

    def distance() -> float:
        return float(np.abs(logprobs_of(model, token_ids) - whole).max())

    unseen = []
    for name, values in [*model.model.named_parameters(), ("inv_freq", model.model.rotary_emb.inv_freq)]:
        kept = values.data.clone()
        values.data.fill_(1.0 if "norm" in name else 0.0)
        if distance() < 10 * TOLERANCE:
            unseen.append(name)
        values.data.copy_(kept)
    assert distance() == 0
    assert not unseen


def test_yarn_shows_in_the_log_probabilities(pair: tuple[LLM, Any]) -> None:
    _, model = pair
    if model.config.rope_parameters["rope_type"] != "yarn":
        pytest.skip("a network without YaRN")
    token_ids = np.random.default_rng(0).integers(0, model.config.vocab_size, 150).tolist()
    whole, rotary = logprobs_of(model, token_ids), model.model.rotary_emb
    kept, dims = rotary.inv_freq.clone(), np.arange(0, model.config.head_dim, 2) / model.config.head_dim
    rotary.inv_freq.copy_(rotary.inv_freq.new_tensor(10000.0**-dims))
    assert np.abs(logprobs_of(model, token_ids) - whole).max() > 10 * TOLERANCE
    rotary.inv_freq.copy_(kept)
