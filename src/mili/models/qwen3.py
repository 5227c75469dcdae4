"""The Qwen3 dense network of a ragged batch as two graphs: `forward` up to the last norm, `sampler` from there.

Attribute and weight names spell exactly like checkpoint keys; fused weights are named for what they fuse. Knows the
network and the order of a step's inputs; knows no files, no requests and no device memory. Invariant: every dim that
changes from step to step is symbolic, so the same compiled graphs serve prefill, decode and any mix, and all layers
but the last are calls of one subgraph, so compile time does not grow with depth. There are two because what a step
samples with may be made while `forward` runs, and to compile them side by side; R rows of H numbers are the least that
can lie between.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from max.dtype import DType
from max.graph import BufferType, BufferValue, DeviceRef, Graph, TensorType, TensorValue, ops

from mili.config import ModelConfig
from mili.models.qwen3_layer import Step, attend, feed_forward
from mili.ops._call import kernels_path
from mili.ops.attention import kv_cache_shapes
from mili.ops.embedding import embedding
from mili.ops.feed_forward import exchange_shape
from mili.ops.linear import linear, linear_weight_shape
from mili.ops.norm import add_rms_norm
from mili.ops.sampling import sample
from mili.ops.take_rows import take_rows

__all__ = ["FORWARD_INPUTS", "SAMPLER_INPUTS", "WeightSpec", "build_forward", "build_sampler", "weight_specs"]

# The arrays of a step in the order of the graphs' inputs. Rotary table, caches and exchange follow those of `forward`;
# the rows that it makes precede those of `sampler`.
FORWARD_INPUTS = (
    "token_ids",
    "positions",
    "slots",
    "query_starts",
    "seq_lens",
    "page_table",
    "logit_rows",
    "max_query_len",
    "max_seq_len",
)
SAMPLER_INPUTS = ("floats", "ints", "edit_starts", "edit_ids", "edit_values", "masks")


@dataclass(frozen=True, slots=True)
class WeightSpec:
    """One weight of the graph: the checkpoint tensors it is made of, row after row."""

    name: str
    parts: tuple[str, ...]
    shape: tuple[int, ...]  # [N, K] of a matrix, [N] of a vector, before packing


def weight_specs(config: ModelConfig) -> list[WeightSpec]:
    """Every weight the graph binds, in the order a checkpoint stores them."""
    hidden, head_dim = config.hidden_size, config.head_dim
    specs = [
        WeightSpec("model.embed_tokens.weight", ("model.embed_tokens.weight",), (config.vocab_size, hidden)),
        WeightSpec("model.norm.weight", ("model.norm.weight",), (hidden,)),
    ]
    if not config.tie_word_embeddings:
        specs.append(WeightSpec("lm_head.weight", ("lm_head.weight",), (config.vocab_size, hidden)))
    for layer in range(config.num_hidden_layers):
        at = f"model.layers.{layer}."
        for name, (parts, shape) in _layer_table(config).items():
            specs.append(WeightSpec(at + name, tuple(at + part for part in parts), shape))
    assert all(head_dim == s.shape[0] for s in specs if s.name.endswith(("q_norm.weight", "k_norm.weight")))
    return specs


def _layer_table(config: ModelConfig) -> dict[str, tuple[tuple[str, ...], tuple[int, ...]]]:
    """Graph weight of a layer -> (its checkpoint tensors, shape). Fusion is this table and nothing else."""
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    q, k, v, o = (f"self_attn.{x}_proj" for x in "qkvo")
    table: dict[str, tuple[tuple[str, ...], tuple[int, ...]]] = {
        "input_layernorm.weight": (("input_layernorm.weight",), (hidden,)),
        "self_attn.qkv_proj.weight": ((f"{q}.weight", f"{k}.weight", f"{v}.weight"), (q_size + 2 * kv_size, hidden)),
        "self_attn.q_norm.weight": (("self_attn.q_norm.weight",), (head_dim,)),
        "self_attn.k_norm.weight": (("self_attn.k_norm.weight",), (head_dim,)),
        "self_attn.o_proj.weight": ((f"{o}.weight",), (hidden, q_size)),
        "post_attention_layernorm.weight": (("post_attention_layernorm.weight",), (hidden,)),
        "mlp.gate_up_proj.weight": (("mlp.gate_proj.weight", "mlp.up_proj.weight"), (2 * inter, hidden)),
        "mlp.down_proj.weight": (("mlp.down_proj.weight",), (hidden, inter)),
    }
    if config.attention_bias:
        table["self_attn.qkv_proj.bias"] = ((f"{q}.bias", f"{k}.bias", f"{v}.bias"), (q_size + 2 * kv_size,))
        table["self_attn.o_proj.bias"] = ((f"{o}.bias",), (hidden,))
    return table


def build_forward(
    config: ModelConfig,
    dtype: DType,
    page_size: int,
    device: DeviceRef,
    batch_invariant: bool = False,
    kernels: Path | None = None,
) -> Graph:
    """Build the graph from token ids to the rows that logits are wanted of.

    Inputs, in order: `FORWARD_INPUTS` (T tokens, B requests, P pages of the longest table, R logit rows), cos_sin
    [M, D] float32, k_cache and v_cache (see `kv_cache_shapes`, written in place) and exchange (see `feed_forward`).
    Output: hidden [R, H] of `dtype`, after the last norm. Weights are external, named as in `weight_specs`. With
    `batch_invariant` a request's outputs have the same bits in whatever batch and chunks; on the CPU they always do.
    `kernels` are ours, precompiled.
    """
    i32, f32, tensor = DType.int32, DType.float32, _tensor_types(device)
    scalar = TensorType(i32, [], DeviceRef.CPU())
    shapes = kv_cache_shapes(
        config.num_hidden_layers, "pages", config.num_key_value_heads, page_size, config.head_dim, device.is_cpu()
    )
    types: dict[str, TensorType | BufferType] = {
        "token_ids": tensor(i32, "T"),
        "positions": tensor(i32, "T"),
        "slots": tensor(i32, "T"),
        "query_starts": tensor(i32, "B_plus_1"),
        "seq_lens": tensor(i32, "B"),
        "page_table": tensor(i32, "B", "P"),
        "logit_rows": tensor(i32, "R"),
        "max_query_len": scalar,
        "max_seq_len": scalar,
        "cos_sin": tensor(f32, "M", config.head_dim),
        "k_cache": BufferType(dtype, shapes[0], device),
        "v_cache": BufferType(dtype, shapes[1], device),
        "exchange": BufferType(DType.uint64, exchange_shape(config.hidden_size, config.intermediate_size), device),
    }
    assert tuple(types)[: len(FORWARD_INPUTS)] == FORWARD_INPUTS
    with Graph("forward", input_types=types.values(), custom_extensions=[kernels or kernels_path()]) as graph:
        given = {
            name: value.buffer if isinstance(types[name], BufferType) else value.tensor
            for name, value in zip(types, graph.inputs, strict=True)
        }
        step = Step(**{name: given[name] for name in Step.__slots__})  # type: ignore[arg-type]
        table = _weight("model.embed_tokens.weight", (config.vocab_size, config.hidden_size), dtype, device)
        x, residual = embedding(_tensor(given["token_ids"]), table, config.hidden_size)
        layer_graph: Graph | None = None
        # --8<-- [start:calls]
        last = config.num_hidden_layers - 1
        for number in range(last):
            layer = ops.constant(number, i32, device=DeviceRef.CPU())
            if layer_graph is None:
                layer_graph = _layer_graph(graph, config, dtype, device, step, x, layer, batch_invariant)
            outputs = ops.call(layer_graph, x, residual, layer, *step.values(), prefix=f"model.layers.{number}.")
            x, residual = outputs[0].tensor, outputs[1].tensor
        # Behind the last attention nobody reads the other rows: of a prompt, all but its last token's.
        weights = _layer_weights(config, dtype, device, f"model.layers.{last}.")
        layer = ops.constant(last, i32, device=DeviceRef.CPU())
        attended, residual = attend(config, weights, x, residual, layer, step, batch_invariant)
        attended, residual = take_rows(attended, residual, _tensor(given["logit_rows"]))
        x, residual = feed_forward(config, weights, attended, residual, step.exchange, batch_invariant)
        # --8<-- [end:calls]
        norm = _weight("model.norm.weight", (config.hidden_size,), dtype, device)
        hidden, _ = add_rms_norm(x, residual, norm, config.rms_norm_eps)
        graph.output(hidden)
    return graph


def build_sampler(
    config: ModelConfig, dtype: DType, device: DeviceRef, batch_invariant: bool = False, kernels: Path | None = None
) -> Graph:
    """Build the graph from hidden rows to tokens.

    Inputs, in order: hidden [R, H] of `dtype` from `forward`, `SAMPLER_INPUTS` (E logit edits, G masks of W words).
    Outputs: those of `Sampled`. The embedding is bound once more if it is the LM head as well.
    """
    i32, f32, tensor = DType.int32, DType.float32, _tensor_types(device)
    types = {
        "hidden": tensor(dtype, "R", config.hidden_size),
        "floats": tensor(f32, "R", 3),
        "ints": tensor(i32, "R", 7),
        "edit_starts": tensor(i32, "R_plus_1"),
        "edit_ids": tensor(i32, "E"),
        "edit_values": tensor(f32, "E", 3),
        "masks": tensor(i32, "G", "W"),
    }
    assert tuple(types)[1:] == SAMPLER_INPUTS
    with Graph("sampler", input_types=types.values(), custom_extensions=[kernels or kernels_path()]) as graph:
        hidden, *sampling = (value.tensor for value in graph.inputs)
        name = "model.embed_tokens.weight" if config.tie_word_embeddings else "lm_head.weight"
        head = _weight(name, (config.vocab_size, config.hidden_size), dtype, device)
        logits = linear(hidden, head, config.vocab_size, out_dtype=f32, batch_invariant=batch_invariant)
        graph.output(*sample(logits, *sampling))
    return graph


def _layer_graph(
    graph: Graph,
    config: ModelConfig,
    dtype: DType,
    device: DeviceRef,
    step: Step,
    x: TensorValue,
    layer: TensorValue,
    batch_invariant: bool,
) -> Graph:
    """One decoder layer as a subgraph: (x, residual, layer, step) -> (x, residual)."""
    values = step.values()
    types = [x.type, x.type, layer.type, *(value.type for value in values)]
    with graph.add_subgraph("qwen3_layer", input_types=types, custom_extensions=graph.kernel_libraries_paths) as sub:
        inputs = list(sub.inputs)
        rest = [v.buffer if isinstance(t, BufferType) else v.tensor for v, t in zip(inputs[3:], types[3:], strict=True)]
        inner = Step(*rest)  # type: ignore[arg-type]
        weights = _layer_weights(config, dtype, device)
        x, residual, layer = (value.tensor for value in inputs[:3])
        attended, residual = attend(config, weights, x, residual, layer, inner, batch_invariant)
        sub.output(*feed_forward(config, weights, attended, residual, inner.exchange, batch_invariant))
    return sub


def _layer_weights(
    config: ModelConfig, dtype: DType, device: DeviceRef, prefix: str | None = None
) -> dict[str, TensorValue]:
    """The weights of layer `prefix`, or those that each call of a subgraph names by a prefix of its own."""
    return {
        name: _weight((prefix or "") + name, shape, dtype, device, placeholder=prefix is None)
        for name, (_, shape) in _layer_table(config).items()
    }


def _weight(
    name: str, shape: tuple[int, ...], dtype: DType, device: DeviceRef, placeholder: bool = False
) -> TensorValue:
    """Declare a weight that is bound when the compiled graph is initialised; matrices are packed on the CPU."""
    stored = linear_weight_shape(*shape, on_cpu=device.is_cpu()) if len(shape) == 2 else list(shape)
    return ops.constant_external(name, TensorType(dtype, stored, device), is_placeholder=placeholder)


def _tensor_types(device: DeviceRef) -> Callable[..., TensorType]:
    return lambda dtype, *shape: TensorType(dtype, list(shape), device)


def _tensor(value: TensorValue | BufferValue) -> TensorValue:
    assert isinstance(value, TensorValue)
    return value
