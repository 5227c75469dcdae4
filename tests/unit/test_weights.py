"""The checkpoint reader: sound checkpoints bit for bit, damaged ones refused by tensor and file."""

import json
import mmap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mili.config import ModelConfig
from mili.errors import WeightError
from mili.models._safetensors import MAX_HEADER_BYTES
from mili.models.hub import BUNDLED_MODEL
from mili.models.weights import Checkpoint, expected_tensors
from support.checkpoints import (
    checkpoint_shapes,
    edit_header,
    random_tensors,
    read_index,
    stored,
    tiny_config,
    without,
    write_checkpoint,
    write_index,
)

SINGLE = "model.safetensors"
Q = "model.layers.1.self_attn.q_proj.weight"
NORM = "model.layers.0.input_layernorm.weight"


def load(folder: Path) -> Checkpoint:
    return Checkpoint(folder, ModelConfig.from_pretrained(folder))


def refusal(folder: Path) -> str:
    with pytest.raises(WeightError) as error:
        load(folder)
    return str(error.value)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("form", [{}, {"tie_word_embeddings": True}, {"attention_bias": True}], ids=str)
def test_every_tensor_is_delivered_bit_for_bit(tmp_path: Path, dtype: str, shards: int, form: dict[str, Any]) -> None:
    values = write_checkpoint(tmp_path, tiny_config(dtype=dtype, **form), shards=shards)
    checkpoint = load(tmp_path)
    assert set(checkpoint.names) == set(values)
    kinds = {"bfloat16": np.uint16, "float16": np.float16, "float32": np.float32}
    for name, value in values.items():
        tensor = checkpoint.tensor(name)
        assert tensor.shape == value.shape and tensor.dtype == kinds[dtype] and not tensor.flags.writeable
        assert np.array_equal(tensor, stored(value, dtype))


def test_expected_tensors_are_those_of_the_layout() -> None:
    for form in ({}, {"tie_word_embeddings": True}, {"attention_bias": True}):
        config = tiny_config(num_attention_heads=4, num_key_value_heads=2, **form)
        write = {name: tuple(shape) for name, shape in checkpoint_shapes(config).items()}
        fields = {name: config[name] for name in ModelConfig.__slots__ if name in config}
        assert expected_tensors(ModelConfig(**fields, rope=None, eos_token_ids=frozenset())) == write  # type: ignore[arg-type]


def test_bundled_checkpoint_opens() -> None:
    checkpoint = load(BUNDLED_MODEL)
    assert checkpoint.tensor("model.embed_tokens.weight").shape == (8192, 256)


def test_tensors_are_views_and_release_keeps_them_valid(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tiny_config(vocab_size=4096))
    checkpoint = load(tmp_path)
    first, again = (checkpoint.tensor("lm_head.weight") for _ in range(2))
    assert np.shares_memory(first, again)
    before = first.copy()
    checkpoint.release("lm_head.weight")
    checkpoint.release(NORM)  # smaller than a page
    assert np.array_equal(first, before)


@pytest.mark.skipif(not hasattr(mmap, "MADV_DONTNEED") or not Path("/proc/self/smaps_rollup").exists(), reason="Linux")
def test_release_lowers_resident_memory(tmp_path: Path) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    write_checkpoint(tmp_path, tiny_config(vocab_size=200_000))  # 25.6 MB each of embed_tokens and lm_head
    checkpoint = load(tmp_path)
    tensor = checkpoint.tensor("lm_head.weight")
    untouched = resident()
    int(tensor.sum(dtype=np.int64))
    touched = resident()
    checkpoint.release("lm_head.weight")
    assert touched - untouched > 20_000_000
    assert resident() - untouched < 5_000_000


def test_unaligned_tensors_are_copied(tmp_path: Path) -> None:
    values = write_checkpoint(tmp_path, tiny_config(dtype="float32"))
    path = tmp_path / SINGLE
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    path.write_bytes((length + 1).to_bytes(8, "little") + data[8 : 8 + length] + b" " + data[8 + length :])
    tensor = load(tmp_path).tensor(Q)
    assert tensor.flags.aligned and np.array_equal(tensor, values[Q])


def test_tied_head_and_rotary_buffers_are_allowed(tmp_path: Path) -> None:
    config = tiny_config(tie_word_embeddings=True)
    extra = {"lm_head.weight": np.ones((3, 3)), "model.layers.0.self_attn.rotary_emb.inv_freq": np.ones(32)}
    write_checkpoint(tmp_path, config, tensors=random_tensors(config) | extra)
    assert "lm_head.weight" not in load(tmp_path).names


def test_missing_tensors(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors=without(random_tensors(tiny_config()), [Q, NORM]))
    message = refusal(tmp_path)
    assert all(part in message for part in ("missing from", Q, NORM, str(tmp_path / SINGLE)))


def test_missing_output_matrix_names_the_cause(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors=without(random_tensors(tiny_config()), ["lm_head.weight"]))
    assert "tie_word_embeddings false" in refusal(tmp_path)


def test_unexpected_tensors(tmp_path: Path) -> None:
    write_checkpoint(
        tmp_path, tensors=random_tensors(tiny_config()) | {"model.layers.0.mlp.gate.weight": np.ones((2, 2))}
    )
    message = refusal(tmp_path)
    assert all(part in message for part in ("unexpected in", "model.layers.0.mlp.gate.weight", str(tmp_path / SINGLE)))


def test_an_unexpected_bias_is_not_ignored(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, tensors=random_tensors(tiny_config(attention_bias=True)))
    assert "model.layers.0.self_attn.q_proj.bias" in refusal(tmp_path)


def test_misshapen_tensors(tmp_path: Path) -> None:
    tensors = random_tensors(tiny_config())
    write_checkpoint(tmp_path, tensors=tensors | {Q: tensors[Q].T})
    message = refusal(tmp_path)
    assert all(part in message for part in (Q, "[64, 128]", "[128, 64]", str(tmp_path / SINGLE)))


def test_mistyped_tensors_are_all_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtype="float32", dtypes={Q: "int32", NORM: "int32"})  # int32 has float32's size
    message = refusal(tmp_path)
    assert all(part in message for part in (f"{Q} (I32)", f"{NORM} (I32)", "BF16, F16, F32", str(tmp_path / SINGLE)))


def test_mixed_dtypes_are_fine(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, dtypes={NORM: "float32"})
    assert load(tmp_path).tensor(NORM).dtype == np.float32


@pytest.mark.parametrize("keep", [0, 5, 8, 200, -1])
def test_truncated_files(tmp_path: Path, keep: int) -> None:
    write_checkpoint(tmp_path)
    path = tmp_path / SINGLE
    path.write_bytes(path.read_bytes()[:keep])
    assert "is truncated" in (message := refusal(tmp_path)) and str(path) in message
    if keep == -1:
        assert "tensor model." in message


def set_entry(name: str, key: str, value: Any) -> Callable[[dict[str, Any]], None]:
    return lambda header: header[name].__setitem__(key, value)


@pytest.mark.parametrize(
    ("edit", "parts"),
    [
        (set_entry(Q, "dtype", "F128"), [Q, "F128"]),
        (set_entry(Q, "dtype", "F32"), [Q, "bytes"]),
        (set_entry(Q, "shape", [128, 65]), [Q, "bytes"]),
        (set_entry(Q, "shape", [-128, -64]), [Q, "shape"]),
        (set_entry(Q, "shape", None), [Q, "shape"]),
        (set_entry(Q, "shape", [2**70, 64]), [Q, "bytes"]),
        (set_entry(Q, "data_offsets", [8, 4]), [Q, "data_offsets"]),
        (set_entry(Q, "data_offsets", [0, 16384, 5]), [Q, "data_offsets"]),
        (set_entry(Q, "data_offsets", [0, 16384]), ["tensors ", " overlap"]),
        (set_entry(Q, "data_offsets", [2**40, 2**40 + 16384]), ["belong to no tensor"]),
        (lambda header: header.__setitem__(Q, [1]), [Q, "not an object"]),
        (lambda header: header.pop(Q), ["belong to no tensor"]),
    ],
)
def test_headers_that_lie(tmp_path: Path, edit: Callable[[dict[str, Any]], None], parts: list[str]) -> None:
    write_checkpoint(tmp_path)
    edit_header(tmp_path / SINGLE, edit)
    message = refusal(tmp_path)
    assert all(part in message for part in [*parts, str(tmp_path / SINGLE)])


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"\xff" * 100, "header length"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "header length"),
        ((2).to_bytes(8, "little") + b"[]", "not an object"),
        ((3).to_bytes(8, "little") + b"{xx", "corrupt"),
        ((3).to_bytes(8, "little") + b'{"\xff', "corrupt"),
        ((15).to_bytes(8, "little") + b'{"a":1,"a":1}  ', "twice"),
        ((20_000).to_bytes(8, "little") + b"[" * 20_000, "corrupt"),
        (b"version https://git-lfs.github.com/spec/v1\n", "git lfs pull"),
        ((2).to_bytes(8, "little") + b"{}" + b"tail", "belong to no tensor"),
    ],
    ids=range(9),
)
def test_files_that_are_not_safetensors(tmp_path: Path, content: bytes, part: str) -> None:
    write_checkpoint(tmp_path)
    (tmp_path / SINGLE).write_bytes(content)
    message = refusal(tmp_path)
    assert part in message and str(tmp_path / SINGLE) in message


def test_absent_shard(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    shard = read_index(tmp_path)[Q]
    (tmp_path / shard).unlink()
    message = refusal(tmp_path)
    assert str(tmp_path / shard) in message and "tensor model." in message


def test_corrupt_shard_is_named(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=3)
    shard = tmp_path / read_index(tmp_path)[Q]
    shard.write_bytes(shard.read_bytes()[:-3])
    assert str(shard) in refusal(tmp_path)


def test_index_and_shards_must_agree(tmp_path: Path) -> None:
    write_checkpoint(tmp_path, shards=2)
    index = read_index(tmp_path)
    other = next(file for file in index.values() if file != index[Q])
    write_index(tmp_path, index | {Q: other})
    assert f"{tmp_path / other} does not hold tensor {Q}" in refusal(tmp_path)
    write_index(tmp_path, {name: file for name, file in index.items() if name != Q})
    assert f"{tmp_path / index[Q]} holds tensor {Q}" in refusal(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": {"a": 1}}', '{"weight_map": {"a": "../secret"}}'])
def test_bad_index(tmp_path: Path, text: str) -> None:
    write_checkpoint(tmp_path, shards=2)
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "model.safetensors.index.json" in refusal(tmp_path)


def test_no_weights_names_what_is_there(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(tiny_config()))
    (tmp_path / "pytorch_model.bin").touch()
    message = refusal(tmp_path)
    assert "pytorch_model.bin" in message and "safetensors only" in message
