"""Ops on the KV cache: `mili.qk_norm_rope_store`, `mili.paged_attention`, and both in one as `mili.rope_attention`."""

from dataclasses import dataclass

from max.dtype import DType
from max.graph import BufferValue, StaticDim, TensorType, TensorValue

from mili.ops._call import check_tensor, kernel_op

FLOATS = (DType.bfloat16, DType.float32)


@dataclass(frozen=True, slots=True)
class CacheView:
    """One layer of the KV cache in a graph: k and v [L, pages, Hkv, ...], the layer's number (int32 host scalar)."""

    k: BufferValue
    v: BufferValue
    layer: TensorValue


def kv_cache_shapes(
    layers: int, pages: int | str, kv_heads: int, page_size: int | str, head_dim: int, on_cpu: bool
) -> tuple[list[int | str], list[int | str]]:
    """Shapes of the key and value caches; the CPU keeps a page's keys side by side, [.., D, S] and not [.., S, D]."""
    head: list[int | str] = [layers, pages, kv_heads]
    values = [*head, page_size, head_dim]
    return ([*head, head_dim, page_size] if on_cpu else values), values


def qk_norm_rope_store(
    qkv: TensorValue,
    q_norm: TensorValue,
    k_norm: TensorValue,
    cos_sin: TensorValue,
    positions: TensorValue,
    slots: TensorValue,
    cache: CacheView,
    eps: float,
) -> TensorValue:
    """Normalise and rotate q and k, write k and v to the cache, return q.

    Args:
        qkv: [T, (Hq + 2 Hkv) * D], bfloat16 or float32.
        q_norm: [D] gain of the query heads.
        k_norm: [D] gain of the key heads.
        cos_sin: [M, D] float32: cosines, then sines, by position.
        positions: [T] int32, below M.
        slots: [T] int32, page * page_size + offset.
        cache: The layer's cache, written.
        eps: Added to the mean square of a head.

    Returns:
        q [T, Hq * D].
    """
    op = "qk_norm_rope_store"
    q_size = _check_projections(op, qkv, q_norm, k_norm, cos_sin, positions, slots, cache)
    out = TensorType(qkv.dtype, [qkv.shape[0], q_size], qkv.device)
    values: list[TensorValue | BufferValue] = [
        qkv,
        q_norm,
        k_norm,
        cos_sin,
        positions,
        slots,
        cache.k,
        cache.v,
        cache.layer,
    ]
    return kernel_op(op, qkv.device, values, [out], {"eps": eps})[0]


def paged_attention(
    q: TensorValue,
    cache: CacheView,
    page_table: TensorValue,
    query_starts: TensorValue,
    seq_lens: TensorValue,
    max_query_len: TensorValue,
    max_seq_len: TensorValue,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> TensorValue:
    """Attend each row to the cached keys of its request up to its own position.

    Args:
        q: [T, Hq * D], bfloat16 or float32.
        cache: The layer's cache, read.
        page_table: [B, P] int32 page ids.
        query_starts: [B + 1] int32 first row of each request, and T.
        seq_lens: [B] int32 cached tokens of each request, this step's included.
        max_query_len: int32 host scalar, most rows of any request.
        max_seq_len: int32 host scalar, most cached tokens of any request.
        scale: Factor on the scores.
        batch_invariant: Whether a row's bits may not depend on how many rows its request has; on the CPU they never do.

    Returns:
        [T, Hq * D].
    """
    op = "paged_attention"
    check_tensor(op, "q", q, FLOATS, "T", "Hq * D")
    kv_heads, head_dim = int(cache.v.shape[2]), int(cache.v.shape[4])
    if int(q.shape[1]) % (kv_heads * head_dim):
        raise ValueError(f"{op}: q has {q.shape[1]} columns, not a multiple of {kv_heads} KV heads of {head_dim}")
    _check_cache(op, cache, q, kv_heads, head_dim)
    _check_requests(op, page_table, query_starts, seq_lens, max_query_len, max_seq_len)
    out = TensorType(q.dtype, q.shape, q.device)
    values: list[TensorValue | BufferValue] = [
        q,
        cache.k,
        cache.v,
        page_table,
        query_starts,
        seq_lens,
        cache.layer,
        max_query_len,
        max_seq_len,
    ]
    return kernel_op(op, q.device, values, [out], {"scale": scale, "batch_invariant": batch_invariant})[0]


def rope_attention(
    qkv: TensorValue,
    q_norm: TensorValue,
    k_norm: TensorValue,
    cos_sin: TensorValue,
    positions: TensorValue,
    slots: TensorValue,
    cache: CacheView,
    page_table: TensorValue,
    query_starts: TensorValue,
    seq_lens: TensorValue,
    max_query_len: TensorValue,
    max_seq_len: TensorValue,
    eps: float,
    scale: float,
    *,
    batch_invariant: bool = False,
) -> TensorValue:
    """`paged_attention` of what `qk_norm_rope_store` returns: one kernel where every request has one token on a GPU.

    Args and the effect on the cache: as those of the two functions.

    Returns:
        [T, Hq * D].
    """
    op = "rope_attention"
    q_size = _check_projections(op, qkv, q_norm, k_norm, cos_sin, positions, slots, cache)
    _check_requests(op, page_table, query_starts, seq_lens, max_query_len, max_seq_len)
    out = TensorType(qkv.dtype, [qkv.shape[0], q_size], qkv.device)
    values: list[TensorValue | BufferValue] = [
        qkv,
        q_norm,
        k_norm,
        cos_sin,
        positions,
        slots,
        cache.k,
        cache.v,
        page_table,
        query_starts,
        seq_lens,
        cache.layer,
        max_query_len,
        max_seq_len,
    ]
    parameters = {"eps": eps, "scale": scale, "batch_invariant": batch_invariant}
    attended, _scratch = kernel_op(op, qkv.device, values, [out, out], parameters)
    return attended


def _check_projections(
    op: str,
    qkv: TensorValue,
    q_norm: TensorValue,
    k_norm: TensorValue,
    cos_sin: TensorValue,
    positions: TensorValue,
    slots: TensorValue,
    cache: CacheView,
) -> int:
    """The inputs of `qk_norm_rope_store`; returns Hq * D."""
    check_tensor(op, "qkv", qkv, FLOATS, "T", "heads")
    head_dim, kv_heads = int(q_norm.shape[0]), int(cache.v.shape[2])
    q_size = int(qkv.shape[1]) - 2 * kv_heads * head_dim
    if head_dim not in (64, 128):
        raise ValueError(f"{op}: head_dim is {head_dim}, expected 64 or 128")
    if q_size <= 0 or q_size % (kv_heads * head_dim):
        raise ValueError(f"{op}: qkv has {qkv.shape[1]} columns, not whole query and {kv_heads} KV heads of {head_dim}")
    check_tensor(op, "q_norm", q_norm, qkv.dtype, head_dim)
    check_tensor(op, "k_norm", k_norm, qkv.dtype, head_dim)
    check_tensor(op, "cos_sin", cos_sin, DType.float32, "M", head_dim)
    check_tensor(op, "positions", positions, DType.int32, "T")
    check_tensor(op, "slots", slots, DType.int32, "T")
    _check_cache(op, cache, qkv, kv_heads, head_dim)
    return q_size


def _check_requests(
    op: str,
    page_table: TensorValue,
    query_starts: TensorValue,
    seq_lens: TensorValue,
    max_query_len: TensorValue,
    max_seq_len: TensorValue,
) -> None:
    """What tells the requests of a ragged batch apart."""
    check_tensor(op, "page_table", page_table, DType.int32, "B", "P")
    check_tensor(op, "query_starts", query_starts, DType.int32, "B + 1")
    check_tensor(op, "seq_lens", seq_lens, DType.int32, "B")
    check_tensor(op, "max_query_len", max_query_len, DType.int32)
    check_tensor(op, "max_seq_len", max_seq_len, DType.int32)


def _check_cache(op: str, cache: CacheView, like: TensorValue, kv_heads: int, head_dim: int) -> None:
    dim = cache.v.shape[3]
    page_size = int(dim) if isinstance(dim, StaticDim) else str(dim)  # a symbolic one is checked by nobody
    if isinstance(page_size, int) and page_size & (page_size - 1):
        raise ValueError(f"{op}: page size is {page_size}, expected a power of two")
    layers = int(cache.v.shape[0])
    k_shape, v_shape = kv_cache_shapes(layers, "pages", kv_heads, page_size, head_dim, like.device.is_cpu())
    check_tensor(op, "k_cache", cache.k, like.dtype, *k_shape)
    check_tensor(op, "v_cache", cache.v, like.dtype, *v_shape)
    check_tensor(op, "layer", cache.layer, DType.int32)
