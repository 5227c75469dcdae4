"""`mili.sample` against the float64 reference, transformers and vLLM's formulas; one compiled graph for all tests."""

import os
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import pytest
from max import driver
from max.driver import CPU, Accelerator, Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.graph import DeviceRef, Graph, TensorType

from mili.ops._call import kernels_path
from mili.ops.sampling import sample
from mili.sampling import SamplerState, SamplingBatch, SamplingRow
from mili.sampling_params import SamplingParams
from support import sampling_reference as reference
from support.graphs import CARRIED, PORTABLE, compiled_graph

QWEN3_VOCAB = 151_936
Logits = npt.NDArray[np.float32]  # [R, V]


class Result(NamedTuple):
    token_ids: npt.NDArray[np.int32]  # [R]
    logprobs: npt.NDArray[np.float32]  # [R]
    ranks: npt.NDArray[np.int32]  # [R]
    top_ids: npt.NDArray[np.int32]  # [R, 20]
    top_logprobs: npt.NDArray[np.float32]  # [R, 20]


def input_types(device: DeviceRef) -> list[TensorType]:
    shapes: list[tuple[DType, list[str | int]]] = [
        (DType.float32, ["R", "V"]),
        (DType.float32, ["R", 3]),
        (DType.int32, ["R", 7]),
        (DType.int32, ["R_plus_1"]),
        (DType.int32, ["E"]),
        (DType.float32, ["E", 3]),
        (DType.int32, ["G", "W"]),
    ]
    return [TensorType(dtype, shape, device) for dtype, shape in shapes]


class Sampler:
    """The op as a function of arrays."""

    def __init__(self, device: Device, cpu_target: str | None = None) -> None:
        self.device = device
        self.session = InferenceSession(devices=[device])
        self.compiled = compiled_graph(self.session, device, "sample", __file__, (), self.graph, cpu_target)

    @cached_property
    def model(self) -> Model:
        return self.session.init(self.compiled)

    def graph(self) -> Graph:
        ref = DeviceRef.CPU() if self.device.is_host else DeviceRef.GPU()
        with Graph("sample", input_types=input_types(ref), custom_extensions=[kernels_path()]) as graph:
            graph.output(*sample(*(value.tensor for value in graph.inputs)))
        return graph

    def __call__(self, logits: Logits, batch: SamplingBatch) -> Result:
        arrays = [logits, batch.floats, batch.ints, batch.edit_starts, batch.edit_ids, batch.edit_values, batch.masks]
        buffers = [Buffer.from_numpy(np.ascontiguousarray(array)).to(self.device) for array in arrays]
        return Result(*(output.to(CPU()).to_numpy().copy() for output in self.model.execute(*buffers)))

    def rows(self, logits: Logits, rows: Sequence[SamplingRow]) -> Result:
        return self(logits, SamplingBatch.build(rows))

    def draws(self, logits: npt.NDArray[np.float32], params: SamplingParams, count: int) -> npt.NDArray[np.int32]:
        """`count` draws from one row [V], at as many positions of one random stream."""
        plain = SamplerState(params, [], seed=11).row()
        rows = [plain._replace(ints=(*plain.ints[:5], position)) for position in range(count)]
        return self.rows(np.tile(logits, (count, 1)), rows).token_ids


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def sampler(request: pytest.FixtureRequest) -> Iterator[Sampler]:
    if request.param == "gpu" and driver.accelerator_count() == 0:
        pytest.skip("no GPU")
    yield Sampler(CPU() if request.param == "cpu" else Accelerator())


def row(seed: int = 0, prompt: Sequence[int] = (1,), **params: Any) -> SamplingRow:
    return SamplerState(SamplingParams(**params), prompt, seed=seed).row()


def normal(rows: int, vocab: int, scale: float = 3.0, seed: int = 0) -> Logits:
    return (np.random.default_rng(seed).standard_normal((rows, vocab)) * scale).astype(np.float32)


# --- the random stream ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "counter, key, words",
    [
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_reference_generator_passes_random123s_known_answers(
    counter: tuple[int, int, int, int], key: tuple[int, int], words: tuple[int, int, int, int]
) -> None:
    assert reference.philox_block(counter, key) == words


def test_a_uniform_draw_is_the_generators_upper_bits(sampler: Sampler) -> None:
    vocab = 4096  # equal masses: the token is the upper 12 bits
    keys = [(seed, position) for seed in (0, 1, 2**32, 2**63 + 12345, -1) for position in range(100)]
    rows = [row(seed=seed, prompt=range(position)) for seed, position in keys]
    got = sampler.rows(np.zeros((len(rows), vocab), np.float32), rows).token_ids
    want = [reference.random_bits(seed, position) >> 52 for seed, position in keys]
    assert got.tolist() == want


# --- draws ---------------------------------------------------------------------------------------------------------

FILTERS: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
    {"temperature": 1.7, "top_p": 0.5},
    {"temperature": 0.3, "min_p": 0.05},
    {"temperature": 1.2, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
    {"temperature": 1e-4, "top_p": 0.9},
    {"temperature": 50.0, "top_k": 7},
    {"top_k": 10**6, "top_p": 1e-9},
]


def shapes_of_rows(vocab: int) -> Logits:
    """[6, V] easy rows and rows that send the threshold search through each of its branches."""
    rng = np.random.default_rng(vocab)
    outlier = rng.uniform(0, 10, vocab)
    outlier[vocab // 2] = 30  # all others are far below: beyond the near bins
    return np.stack(
        [
            rng.standard_normal(vocab) * 3,
            rng.standard_normal(vocab) * 0.01,
            outlier,
            np.linspace(-40, 40, vocab),  # ascending
            rng.standard_normal(vocab) * 1e-6 + 7,  # many neighbouring floats
            -np.abs(rng.standard_normal(vocab)) * 1000,
        ]
    ).astype(np.float32)


@pytest.mark.parametrize("vocab", [1, 2, 5, 16, 131, 1000, 8193, QWEN3_VOCAB])
def test_draws_invert_the_float64_distribution(sampler: Sampler, vocab: int) -> None:
    logits = shapes_of_rows(vocab)
    cases = [(i, params, seed) for i in range(len(logits)) for params in FILTERS for seed in (3, 4)]
    rows = [row(seed=seed, **params) for _, params, seed in cases]
    got = sampler.rows(logits[[i for i, _, _ in cases]], rows).token_ids
    for token, (i, params, seed) in zip(got.tolist(), cases, strict=True):
        filters: dict[str, Any] = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, **params}
        # Scaling rounds to float32 before exp: an error of y * 2^-24 in y, so that much, relative, in each mass.
        spread = abs(float(logits[i].max() - logits[i].min())) / filters["temperature"]
        slack = 1e-6 + 2e-7 * min(spread, 30)
        p = reference.probabilities(logits[i], **filters)
        tied = p[token] == 0 and on_the_edge(logits[i], token, filters, slack)
        assert p[token] > 0 or tied, (i, params, seed)
        u = reference.random_bits(seed, 1) / 2**64
        before = p[:token].sum()
        edge = 0.02 if tied or near_edge(logits[i], filters, slack) else slack
        assert before - edge <= u <= before + p[token] + edge, (i, params, seed)


def near_edge(logits: npt.NDArray[np.float32], filters: dict[str, Any], slack: float) -> bool:
    """Whether rounding can move the border of the kept tokens."""
    wide, narrow = (
        reference.kept(logits, filters["temperature"], moved(filters["top_p"], s), filters["top_k"], filters["min_p"])
        for s in (slack, -slack)
    )
    return bool((wide != narrow).any())


def moved(top_p: float, by: float) -> float:
    return min(max(top_p * (1 + by), 1e-12), 1.0) if top_p < 1 else 1.0


def on_the_edge(logits: npt.NDArray[np.float32], token: int, filters: dict[str, Any], slack: float) -> bool:
    return bool(
        reference.kept(
            logits,
            filters["temperature"],
            moved(filters["top_p"], slack),
            filters["top_k"],
            filters["min_p"] * (1 - slack),
        )[token]
    )


@pytest.mark.parametrize(
    "params",
    [
        {"temperature": 0.7},
        {"top_k": 5},
        {"top_p": 0.7},
        {"min_p": 0.3},
        {"temperature": 1.5, "top_k": 12, "top_p": 0.9},
        {"temperature": 0.8, "top_p": 0.95, "min_p": 0.1},
        {"temperature": 2.0, "top_k": 20, "top_p": 0.8, "min_p": 0.2},
    ],
)
def test_kept_tokens_and_their_frequencies_are_those_of_transformers(sampler: Sampler, params: dict[str, Any]) -> None:
    probabilities = transformers_probabilities(normal(1, 40, scale=1.0, seed=5)[0], **params)
    count = 20_000
    draws = sampler.draws(normal(1, 40, scale=1.0, seed=5)[0], SamplingParams(**params), count)
    seen = np.bincount(draws, minlength=40)
    assert not seen[probabilities == 0].any(), "drew a token that transformers filters out"
    possible = probabilities > 0
    assert seen[possible].all(), "never drew a token that transformers keeps"
    expected = probabilities[possible] * count
    chi_square = ((seen[possible] - expected) ** 2 / expected).sum()
    freedom = max(int(possible.sum()) - 1, 1)
    assert chi_square < freedom + 5 * np.sqrt(2 * freedom)


def transformers_probabilities(
    logits: npt.NDArray[np.float32], temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0
) -> npt.NDArray[np.float64]:
    torch = pytest.importorskip("torch")
    from transformers import (
        LogitsProcessorList,
        MinPLogitsWarper,
        TemperatureLogitsWarper,
        TopKLogitsWarper,
        TopPLogitsWarper,
    )

    chain = LogitsProcessorList([TemperatureLogitsWarper(temperature)])
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        chain.append(TopPLogitsWarper(top_p))
    if min_p:
        chain.append(MinPLogitsWarper(min_p))
    scores = chain(torch.zeros((1, 1), dtype=torch.long), torch.from_numpy(logits[None].copy()))
    result: npt.NDArray[np.float64] = torch.softmax(scores.double(), -1)[0].numpy()
    return result


def test_tokens_tied_with_the_last_kept_one_are_kept(sampler: Sampler) -> None:
    logits = np.array([0, 3, 3, 5, 3, 1, 3], np.float32)
    assert set(sampler.draws(logits, SamplingParams(top_k=2), 500).tolist()) == {1, 2, 3, 4, 6}
    assert set(sampler.draws(logits, SamplingParams(top_p=0.7), 500).tolist()) == {1, 2, 3, 4, 6}


def test_negative_zero_ties_with_zero(sampler: Sampler) -> None:
    logits = np.array([-1, -0.0, 0.0, -1], np.float32)
    assert set(sampler.draws(logits, SamplingParams(top_k=1), 100).tolist()) == {1, 2}
    assert sampler.rows(logits[None], [row(temperature=0)]).token_ids.tolist() == [1]


def test_top_k_1_is_greedy(sampler: Sampler) -> None:
    for vocab in (3, 1000, QWEN3_VOCAB):
        logits = normal(8, vocab)
        assert (sampler.rows(logits, [row(top_k=1, temperature=2.0)] * 8).token_ids == logits.argmax(1)).all()


@pytest.mark.parametrize("vocab", [1, 4, 33, 8192, QWEN3_VOCAB + 1])
def test_greedy_takes_the_lowest_id_among_equals(sampler: Sampler, vocab: int) -> None:
    logits = np.round(normal(6, vocab, scale=1.0)).astype(np.float32)
    logits[0] = 0
    logits[1, -1] = 50
    assert (sampler.rows(logits, [row(temperature=0)] * 6).token_ids == logits.argmax(1)).all()


# --- edits ---------------------------------------------------------------------------------------------------------


def test_edits_decide_and_raw_logits_are_reported(sampler: Sampler) -> None:
    count, vocab = 64, 300
    logits = normal(count, vocab)
    rng = np.random.default_rng(1)
    rows, want = [], []
    for i in range(count):
        bias = {int(t): float(b) for t, b in zip(rng.integers(0, vocab, 5), rng.uniform(-9, 9, 5), strict=True)}
        params = SamplingParams(
            temperature=0,
            logit_bias=bias,
            repetition_penalty=1.4,
            presence_penalty=0.5,
            frequency_penalty=0.3,
            logprobs=0,
        )
        state = SamplerState(params, rng.integers(0, vocab, 40).tolist())
        for token in rng.integers(0, vocab, 100).tolist():
            state.append(token)
        rows.append(state.row() if i % 3 else row(temperature=0, logprobs=0))
        want.append(reference.edited(logits[i], edit_list(rows[-1])).argmax())
    result = sampler.rows(logits, rows)
    assert result.token_ids.tolist() == want
    assert (result.token_ids != logits.argmax(1)).any()
    raw = [reference.log_softmax(x)[t] for x, t in zip(logits, want, strict=True)]
    np.testing.assert_allclose(result.logprobs, raw, atol=1e-5)


def edit_list(given: SamplingRow) -> list[tuple[int, float, float, float]]:
    if given.edit_ids is None or given.edit_values is None:
        return []
    return [(i, *values) for i, values in zip(given.edit_ids.tolist(), given.edit_values.tolist(), strict=True)]


def test_repetition_penalty_is_that_of_transformers(sampler: Sampler) -> None:
    torch = pytest.importorskip("torch")
    from transformers import RepetitionPenaltyLogitsProcessor

    logits = normal(32, 500, seed=2)
    tokens = np.random.default_rng(3).integers(0, 500, (32, 300))
    processed = RepetitionPenaltyLogitsProcessor(1.5)(torch.from_numpy(tokens), torch.from_numpy(logits.copy())).numpy()
    rows = [row(prompt=prompt.tolist(), temperature=0, repetition_penalty=1.5) for prompt in tokens]
    got = sampler.rows(logits, rows).token_ids
    assert got.tolist() == processed.argmax(1).tolist() and (got != logits.argmax(1)).any()


@pytest.mark.parametrize("penalty", [1e-6, 1e6])
def test_the_strongest_repetition_penalties_leave_a_token_to_draw(sampler: Sampler, penalty: float) -> None:
    logits = normal(16, 500, seed=4) * np.float32(100)
    rows = [row(prompt=range(250), temperature=t, repetition_penalty=penalty) for t in (0, 2e-5, 1.0, 1e6) * 4]
    divided = np.where(logits > 0, logits / np.float32(penalty), logits * np.float32(penalty))
    want = np.concatenate([divided[:, :250], logits[:, 250:]], axis=1).argmax(1)
    got = sampler.rows(logits, rows).token_ids
    cold = [i for i in range(16) if i % 4 < 2]
    assert got[cold].tolist() == want[cold].tolist() and ((got >= 0) & (got < 500)).all()


def test_banned_tokens_are_never_drawn(sampler: Sampler) -> None:
    logits = np.array([9, 8, 0, 0, 7], np.float32)
    state = SamplerState(SamplingParams(min_tokens=3, repetition_penalty=0.5), [0], stop_ids={0, 4}, bad_words=[[1]])
    rows = [state.row()._replace(ints=(0, -1, -1, 1, 2, position)) for position in range(500)]
    drawn = sampler.rows(np.tile(logits, (500, 1)), rows).token_ids
    assert set(drawn.tolist()) == {2, 3}


def test_a_bias_can_lift_a_token_over_all_others(sampler: Sampler) -> None:
    for vocab in (64, 65, QWEN3_VOCAB):
        logits = normal(3, vocab)
        rows = [row(logit_bias={t: 100.0}) for t in (0, vocab // 2, vocab - 1)]
        assert sampler.rows(logits, rows).token_ids.tolist() == [0, vocab // 2, vocab - 1]


def test_edits_outside_the_vocabulary_are_ignored(sampler: Sampler) -> None:
    logits = normal(2, 10)
    rows = [row(temperature=0, logit_bias={10: 100.0, 2**31 - 1: 100.0}), row(temperature=0)]
    assert sampler.rows(logits, rows).token_ids.tolist() == logits.argmax(1).tolist()


# --- masks ---------------------------------------------------------------------------------------------------------


def mask_of(vocab: int, allowed: Sequence[int]) -> npt.NDArray[np.int32]:
    """[ceil(V / 32)] the bits of `allowed`; those past the vocabulary are set, which must not matter."""
    bits = np.zeros(-(-vocab // 32) * 32, np.uint8)
    bits[[*allowed, *range(vocab, len(bits))]] = 1
    return np.packbits(bits, bitorder="little").view(np.int32)


@pytest.mark.parametrize("vocab", [1, 5, 31, 32, 33, 64, 95, 1000, 8193, QWEN3_VOCAB])
def test_the_only_allowed_token_is_drawn(sampler: Sampler, vocab: int) -> None:
    allowed = sorted({0, vocab // 2, vocab - 1, *range(0, vocab, -(-vocab // 7))})
    rows = [
        row(temperature=t, seed=token)._replace(mask=mask_of(vocab, [token])) for token in allowed for t in (0, 1.0)
    ]
    drawn = sampler.rows(normal(len(rows), vocab), rows).token_ids
    assert drawn.tolist() == [token for token in allowed for _ in range(2)]


@pytest.mark.parametrize("vocab", [7, 32, 131, 1000, 8193])
@pytest.mark.parametrize("params", FILTERS)
def test_a_masked_row_is_the_row_with_the_others_at_minus_infinity(
    sampler: Sampler, vocab: int, params: dict[str, Any]
) -> None:
    rng = np.random.default_rng(vocab)
    logits = shapes_of_rows(vocab)
    masks = [mask_of(vocab, np.flatnonzero(rng.random(vocab) < share)) for share in (0.9, 0.5, 0.1, 0.03, 0.5, 0.5)]
    plain = [row(seed=i, **params) for i in range(len(logits))]
    masked = [given._replace(mask=mask) for given, mask in zip(plain, masks, strict=True)]
    got = sampler.rows(logits, masked).token_ids
    buried = np.stack([reference.masked(x, mask.tolist()) for x, mask in zip(logits, masks, strict=True)])
    assert got.tolist() == sampler.rows(buried.astype(np.float32), plain).token_ids.tolist()


def test_a_mask_comes_after_edits_and_log_probabilities_are_those_of_the_raw_row(sampler: Sampler) -> None:
    count, vocab = 48, 333
    logits = normal(count, vocab)
    rng = np.random.default_rng(4)
    rows, want = [], []
    for i in range(count):
        mask = mask_of(vocab, np.flatnonzero(rng.random(vocab) < 0.2))
        lifted = {int(token): 100.0 for token in rng.integers(0, vocab, 5)}
        params = SamplingParams(temperature=0, logit_bias=lifted, repetition_penalty=1.4, logprobs=3)
        given = SamplerState(params, rng.integers(0, vocab, 40).tolist()).row()._replace(mask=mask)
        rows.append(given)
        want.append(reference.masked(reference.edited(logits[i], edit_list(given)), mask.tolist()).argmax())
    result = sampler.rows(logits, rows)
    assert result.token_ids.tolist() == want
    raw = [reference.log_softmax(x)[t] for x, t in zip(logits, want, strict=True)]
    np.testing.assert_allclose(result.logprobs, raw, atol=1e-5)
    assert result.top_ids[:, :3].tolist() == [reference.top(x, 3).tolist() for x in logits]


def test_banned_and_masked_leave_nothing_and_give_token_0(sampler: Sampler) -> None:
    given = SamplerState(SamplingParams(), [0], bad_words=[[3]]).row()._replace(mask=mask_of(50, [3]))
    empty = row()._replace(mask=mask_of(50, []))
    assert sampler.rows(normal(2, 50), [given, empty]).token_ids.tolist() == [0, 0]


def test_tokens_past_a_masks_words_are_forbidden(sampler: Sampler) -> None:
    logits = np.zeros((1, 100), np.float32)
    logits[0, [40, 99]] = [1.0, 9.0]
    short = row(temperature=0)._replace(mask=np.full(2, -1, np.int32))
    assert sampler.rows(logits, [short]).token_ids.tolist() == [40]


def test_a_mask_that_is_not_there_is_ignored(sampler: Sampler) -> None:
    logits = normal(2, 100)
    batch = SamplingBatch.build([row(temperature=0), row(temperature=0)._replace(mask=mask_of(100, [5]))])
    batch.ints[0, 6] = 1
    assert sampler(logits, batch).token_ids.tolist() == [logits[0].argmax(), 5]


def test_masks_leave_the_neighbours_as_they_are(sampler: Sampler) -> None:
    for vocab in (77, 8192, QWEN3_VOCAB):
        logits = normal(12, vocab)
        plain = [row(seed=i, logprobs=i % 4, repetition_penalty=1.0 + i % 2, **FILTERS[i % 8]) for i in range(12)]
        mixed = [r._replace(mask=mask_of(vocab, [i])) if i % 3 == 1 else r for i, r in enumerate(plain)]
        without, beside = sampler.rows(logits, plain), sampler.rows(logits, mixed)
        others = [i for i in range(12) if i % 3 != 1]
        for field, again in zip(without, beside, strict=True):
            assert field[others].tobytes() == again[others].tobytes()
        assert beside.token_ids[[1, 4, 7, 10]].tolist() == [1, 4, 7, 10]


# --- log-probabilities ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("vocab", [1, 7, 20, 1000, 8193, QWEN3_VOCAB])
def test_logprobs_ranks_and_top_tokens(sampler: Sampler, vocab: int) -> None:
    logits = shapes_of_rows(vocab)
    asked = [0, 1, 5, 20, 20, 3]
    rng = np.random.default_rng(0)
    targets = [-1, -1, *rng.integers(0, vocab, 4).tolist()]
    rows = [SamplingRow.scoring(t, n) for t, n in zip(targets, asked, strict=True)]
    result = sampler.rows(logits, rows)
    for i, (target, n) in enumerate(zip(targets, asked, strict=True)):
        token = target if target >= 0 else int(result.token_ids[i])
        n = min(n, vocab)
        want = reference.log_softmax(logits[i])
        tolerance = 1e-5 + 1e-6 * np.abs(want).max()  # float32 cannot hold -1000 to 1e-5
        assert result.logprobs[i] == pytest.approx(want[token], abs=tolerance)
        assert result.ranks[i] == reference.rank(logits[i], token)
        best = reference.top(logits[i], n)
        assert result.top_ids[i, :n].tolist() == best.tolist()
        np.testing.assert_allclose(result.top_logprobs[i, :n], want[best], atol=tolerance)
        assert (result.top_ids[i, n:] == -1).all() and np.isneginf(result.top_logprobs[i, n:]).all()


def test_logprobs_of_usual_logits_are_within_1e_5(sampler: Sampler) -> None:
    logits = normal(4, QWEN3_VOCAB)
    result = sampler.rows(logits, [row(logprobs=20, seed=s) for s in range(4)])
    for i in range(4):
        want = reference.log_softmax(logits[i])
        assert abs(result.logprobs[i] - want[result.token_ids[i]]) < 1e-5
        assert np.abs(result.top_logprobs[i] - want[result.top_ids[i]]).max() < 1e-5


def test_top_tokens_among_equals_are_the_lowest_ids(sampler: Sampler) -> None:
    logits = np.zeros((2, 5000), np.float32)
    logits[1, [4000, 77, 4999]] = 1
    result = sampler.rows(logits, [row(temperature=0, logprobs=5)] * 2)
    assert result.top_ids[:, :5].tolist() == [[0, 1, 2, 3, 4], [77, 4000, 4999, 0, 1]]
    assert result.ranks.tolist() == [1, 1]


def test_rows_without_logprobs_report_nothing(sampler: Sampler) -> None:
    result = sampler.rows(normal(2, 100), [row(), row(logprobs=2)])
    assert (result.logprobs[0], result.ranks[0]) == (0, 0)
    assert (result.top_ids[0] == -1).all() and np.isneginf(result.top_logprobs[0]).all()
    assert result.logprobs[1] < 0 and result.ranks[1] >= 1


# --- rows and numbers that nobody expects ---------------------------------------------------------------------------


def test_a_row_is_the_same_alone_and_in_a_crowd(sampler: Sampler) -> None:
    count = 24
    for vocab in (77, 8192, QWEN3_VOCAB):
        logits = normal(count, vocab)
        rows = [
            row(seed=i, prompt=range(i), logprobs=i % 21, repetition_penalty=1.0 + i % 2, **FILTERS[i % len(FILTERS)])
            for i in range(count)
        ]
        crowd = sampler.rows(logits, rows)
        order = np.random.default_rng(0).permutation(count)
        shuffled = sampler.rows(logits[order], [rows[i] for i in order])
        for field, mixed in zip(crowd, shuffled, strict=True):
            assert field[order].tobytes() == mixed.tobytes()
        for i in range(0, count, 5):
            alone = sampler.rows(logits[i : i + 1], [rows[i]])
            for field, single in zip(crowd, alone, strict=True):
                assert field[i : i + 1].tobytes() == single.tobytes()


@pytest.mark.parametrize("params", FILTERS)
def test_nan_and_infinities(sampler: Sampler, params: dict[str, Any]) -> None:
    nan, inf = np.nan, np.inf
    logits = np.array(
        [[nan, 2, -inf, 2, nan], [nan, 1, inf, -inf, 0], [-inf, nan, -inf, -inf, 3], [-nan, 0, inf, inf, nan]],
        np.float32,
    )
    allowed = [{1, 3}, {2}, {4}, {2, 3}]
    for seed in range(10):
        result = sampler.rows(logits, [row(seed=seed, logprobs=5, **params)] * 4)
        for i, tokens in enumerate(allowed):
            assert int(result.token_ids[i]) in tokens
        assert not np.isnan(result.logprobs).any() and not np.isnan(result.top_logprobs).any()


def test_a_row_with_no_possible_token_gives_token_0(sampler: Sampler) -> None:
    logits = np.array([[-np.inf] * 6, [np.nan] * 6], np.float32)
    result = sampler.rows(logits, [row(logprobs=3, top_k=2), row(temperature=0, logprobs=3)])
    assert result.token_ids.tolist() == [0, 0] and np.isneginf(result.logprobs).all()


def test_target_outside_the_vocabulary_reports_the_sampled_token(sampler: Sampler) -> None:
    logits = normal(1, 50)
    result = sampler.rows(logits, [SamplingRow.scoring(50, 0)])
    assert result.ranks.tolist() == [1]


def test_the_batch_for_nobody_runs(sampler: Sampler) -> None:
    assert sampler.rows(normal(1, 9), []).logprobs.tolist() == [0]


def test_gpu_draws_what_the_cpu_draws(sampler: Sampler) -> None:
    if sampler.device.is_host:
        pytest.skip("compares the GPU with the CPU")
    on_cpu = Sampler(CPU(), PORTABLE if CARRIED in os.environ else None)
    # Up to 2048 candidates a GPU draws from a list of them.
    filters = [*FILTERS, {"top_k": 2048}, {"top_k": 2049}, {"top_k": 3000, "top_p": 0.99}, {"top_k": 100, "min_p": 0.2}]
    for vocab in (101, 2049, QWEN3_VOCAB):
        logits = np.concatenate([shapes_of_rows(vocab)] * len(filters))
        rows = [
            row(seed=i, repetition_penalty=1 + i % 2, logprobs=i % 21, **filters[i % len(filters)])
            for i in range(len(logits))
        ]
        got, want = sampler.rows(logits, rows), on_cpu.rows(logits, rows)
        assert (got.token_ids == want.token_ids).all() and (got.top_ids == want.top_ids).all()


# --- mistakes in the graph -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argument, wrong, message",
    [
        (0, TensorType(DType.bfloat16, ["R", "V"], DeviceRef.CPU()), "logits has dtype bfloat16, expected float32"),
        (1, TensorType(DType.float32, ["R", 4], DeviceRef.CPU()), "floats has shape"),
        (2, TensorType(DType.int64, ["R", 7], DeviceRef.CPU()), "ints has dtype int64"),
        (3, TensorType(DType.int32, ["R", 1], DeviceRef.CPU()), "edit_starts has shape"),
        (5, TensorType(DType.float32, ["E", 2], DeviceRef.CPU()), "edit_values has shape"),
        (6, TensorType(DType.int32, ["G"], DeviceRef.CPU()), "masks has shape"),
    ],
)
def test_wrong_inputs_are_refused_when_the_graph_is_built(argument: int, wrong: TensorType, message: str) -> None:
    types = input_types(DeviceRef.CPU())
    types[argument] = wrong
    with Graph("wrong", input_types=types) as graph, pytest.raises(ValueError, match=message):
        sample(*(value.tensor for value in graph.inputs))
