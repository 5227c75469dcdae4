"""A mistake in a graph is a ValueError in the glossary's words where it is made, not a compiler's message later."""

import pytest
from max.dtype import DType
from max.graph import BufferType, DeviceRef, Graph, TensorType

from mili.ops.activation import silu_mul
from mili.ops.attention import CacheView, kv_cache_shapes, paged_attention, qk_norm_rope_store, rope_attention
from mili.ops.embedding import embedding
from mili.ops.feed_forward import feed_forward
from mili.ops.linear import linear, linear_weight_shape
from mili.ops.norm import add_rms_norm
from mili.ops.norm_linear import norm_linear, norm_linear_silu_mul
from mili.ops.take_rows import take_rows

CPU, F32, BF16, I32 = DeviceRef.CPU(), DType.float32, DType.bfloat16, DType.int32
Given = tuple[DType, tuple[int | str, ...]]


def refused(call, message: str, **given: Given) -> None:
    """`call`, handed one graph input for each of `given`, raises a ValueError with `message`."""
    kinds = [BufferType if name in ("k", "v", "exchange") else TensorType for name in given]
    types = [kind(dtype, list(shape), CPU) for kind, (dtype, shape) in zip(kinds, given.values(), strict=True)]
    with Graph("refused", input_types=types) as graph:
        values = dict(zip(given, graph.inputs, strict=True))
        arguments = {n: v.buffer if n in ("k", "v", "exchange") else v.tensor for n, v in values.items()}
        with pytest.raises(ValueError, match=message):
            call(**arguments)
        graph.output()


ROW: Given = (F32, ("T", 64))
GAIN: Given = (F32, (64,))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": (I32, ("T", 64))}, "add_rms_norm: x has dtype int32, expected bfloat16 or float32"),
        ({"residual": (BF16, ("T", 64))}, "add_rms_norm: residual has dtype bfloat16, expected float32"),
        ({"residual": (F32, ("T", 63))}, r"add_rms_norm: residual has shape \['T', 63\], expected \['T', 64\]"),
        ({"weight": (F32, (63,))}, r"add_rms_norm: weight has shape \[63\], expected \[64\]"),
        ({"weight": (F32, (1, 64))}, r"add_rms_norm: weight has shape \[1, 64\], expected \[64\]"),
    ],
)
def test_norm(change: dict[str, Given], message: str) -> None:
    refused(lambda **x: add_rms_norm(**x, eps=1e-6), message, **{"x": ROW, "residual": ROW, "weight": GAIN, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"b": (BF16, ("T", 64))}, "take_rows: b has dtype bfloat16, expected float32"),
        ({"rows": (DType.int64, ("R",))}, "take_rows: rows has dtype int64, expected int32"),
    ],
)
def test_take_rows(change: dict[str, Given], message: str) -> None:
    refused(take_rows, message, **{"a": ROW, "b": ROW, "rows": (I32, ("R",)), **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": (F32, ("T", 63))}, r"norm_linear: residual has shape \['T', 63\], expected \['T', 64\]"),
        ({"gain": (BF16, (64,))}, "norm_linear: gain has dtype bfloat16, expected float32"),
        ({"weight": (F32, (33, 64))}, r"norm_linear: weight has shape \[33, 64\], expected \[2, 2048\]"),
        ({"bias": (F32, (32,))}, r"norm_linear: bias has shape \[32\], expected \[33\]"),
    ],
)
def test_norm_linear(change: dict[str, Given], message: str) -> None:
    given = {"x": ROW, "residual": ROW, "gain": GAIN, "weight": (F32, (2, 2048)), "bias": (F32, (33,)), **change}
    refused(lambda **x: norm_linear(**x, out_features=33, eps=1e-6), message, **given)


def test_norm_linear_silu_mul() -> None:
    refused(
        lambda **x: norm_linear_silu_mul(**x, width=33, eps=1e-6),
        r"norm_linear_silu_mul: weight has shape \[2, 2048\], expected \[3, 2048\]",
        x=ROW,
        residual=ROW,
        gain=GAIN,
        weight=(F32, (2, 2048)),
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"residual": (BF16, ("T", 64))}, "feed_forward: residual has dtype bfloat16, expected float32"),
        ({"w_o": (F32, (64, 128))}, r"feed_forward: w_o has shape \[64, 128\], expected \[2, 4096\]"),
        ({"w_down": (F32, (2, 2048))}, r"feed_forward: w_down has shape \[2, 2048\], expected \[2, 1056\]"),
        ({"exchange": (DType.uint64, (1,))}, r"feed_forward: exchange has shape \[1\], expected \[210\]"),
    ],
)
def test_feed_forward(change: dict[str, Given], message: str) -> None:
    given: dict[str, Given] = {"attended": (F32, ("T", 128)), "residual": ROW, "gain": GAIN, "w_o": (F32, (2, 4096))}
    given |= {"w_gate_up": (F32, (3, 2048)), "w_down": (F32, (2, 1056)), "exchange": (DType.uint64, (210,)), **change}
    refused(lambda **x: feed_forward(**x, width=33, eps=1e-6), message, **given)


def test_silu_mul() -> None:
    refused(silu_mul, "silu_mul: gate_up has 65 columns, expected an even number", gate_up=(F32, ("T", 65)))


def test_embedding() -> None:
    message = "embedding: token_ids has dtype float32, expected int32"
    refused(lambda **x: embedding(**x, hidden_size=64), message, token_ids=(F32, ("T",)), table=(F32, (4, 2048)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": (F32, (33, 64))}, r"linear: weight has shape \[33, 64\], expected \[2, 2048\]"),
        ({"weight": (BF16, (2, 2048))}, "linear: weight has dtype bfloat16, expected float32"),
        ({"bias": (F32, (32,))}, r"linear: bias has shape \[32\], expected \[33\]"),
    ],
)
def test_linear(change: dict[str, Given], message: str) -> None:
    assert linear_weight_shape(33, 64, on_cpu=True) == [2, 2048]
    assert linear_weight_shape(33, 64, on_cpu=False) == [33, 64]
    given = {"x": ROW, "weight": (F32, (2, 2048)), "bias": (F32, (33,)), **change}
    refused(lambda **x: linear(**x, out_features=33), message, **given)


def cache(page_size: int = 16, head_dim: int = 64) -> dict[str, Given]:
    k, v = kv_cache_shapes(2, "pages", 2, page_size, head_dim, on_cpu=True)
    return {"k": (F32, tuple(k)), "v": (F32, tuple(v)), "layer": (I32, ())}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (F32, ("T", 300))}, "qkv has 300 columns, not whole"),
        ({"qkv": (F32, ("T", 5 * 64))}, "qkv has 320 columns, not whole"),
        ({"q_norm": (F32, (96,)), "k_norm": (F32, (96,)), **cache(head_dim=96)}, "head_dim is 96, expected 64 or 128"),
        ({"k_norm": (F32, (128,))}, r"k_norm has shape \[128\], expected \[64\]"),
        ({"cos_sin": (BF16, ("M", 64))}, "cos_sin has dtype bfloat16, expected float32"),
        ({"slots": (DType.int64, ("T",))}, "slots has dtype int64, expected int32"),
        (cache(page_size=24), "page size is 24, expected a power of two"),
        ({"k": (F32, (2, "pages", 2, 16, 64))}, r"k_cache has shape \[2, 'pages', 2, 16, 64\], expected"),
        ({"v": (BF16, (2, "pages", 2, 16, 64))}, "v_cache has dtype bfloat16, expected float32"),
        ({"layer": (DType.int64, ())}, "layer has dtype int64, expected int32"),
    ],
)
def test_qk_norm_rope_store(change: dict[str, Given], message: str) -> None:
    row: Given = (I32, ("T",))
    given = {"qkv": (F32, ("T", 512)), "q_norm": GAIN, "k_norm": GAIN, "cos_sin": (F32, ("M", 64))}
    given |= {"positions": row, "slots": row, **cache(), **change}
    refused(
        lambda k, v, layer, **x: qk_norm_rope_store(**x, cache=CacheView(k, v, layer), eps=1e-6),
        f"qk_norm_rope_store: {message}",
        **given,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"q": (F32, ("T", 320))}, "q has 320 columns, not a multiple of 2 KV heads of 64"),
        ({"page_table": (I32, ("B",))}, r"page_table has shape \['B'\], expected \['B', 'P'\]"),
        ({"query_starts": (F32, ("B1",))}, "query_starts has dtype float32, expected int32"),
        ({"seq_lens": (DType.int64, ("B",))}, "seq_lens has dtype int64, expected int32"),
        ({"max_seq_len": (I32, (1,))}, r"max_seq_len has shape \[1\], expected \[\]"),
        (cache(page_size=24), "page size is 24, expected a power of two"),
    ],
)
def test_paged_attention(change: dict[str, Given], message: str) -> None:
    given = {"q": (F32, ("T", 256)), "page_table": (I32, ("B", "P")), "query_starts": (I32, ("B1",))}
    given |= {"seq_lens": (I32, ("B",)), "max_query_len": (I32, ()), "max_seq_len": (I32, ()), **cache(), **change}
    refused(
        lambda k, v, layer, **x: paged_attention(**x, cache=CacheView(k, v, layer), scale=0.125),
        f"paged_attention: {message}",
        **given,
    )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"qkv": (F32, ("T", 300))}, "qkv has 300 columns, not whole"),
        ({"seq_lens": (DType.int64, ("B",))}, "seq_lens has dtype int64, expected int32"),
        (cache(page_size=24), "page size is 24, expected a power of two"),
    ],
)
def test_rope_attention(change: dict[str, Given], message: str) -> None:
    row: Given = (I32, ("T",))
    given = {"qkv": (F32, ("T", 512)), "q_norm": GAIN, "k_norm": GAIN, "cos_sin": (F32, ("M", 64))}
    given |= {"positions": row, "slots": row, "page_table": (I32, ("B", "P")), "query_starts": (I32, ("B1",))}
    given |= {"seq_lens": (I32, ("B",)), "max_query_len": (I32, ()), "max_seq_len": (I32, ()), **cache(), **change}
    refused(
        lambda k, v, layer, **x: rope_attention(**x, cache=CacheView(k, v, layer), eps=1e-6, scale=0.125),
        f"rope_attention: {message}",
        **given,
    )
