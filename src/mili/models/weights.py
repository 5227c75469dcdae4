"""``Checkpoint``: the safetensors files of a model folder, checked against the model before any weight is read.

Knows which tensors a Qwen3 has, under their checkpoint names, and where each lies; knows no device and no packing.
Invariant: a ``Checkpoint`` that exists holds every tensor the model needs, in its shape, in a dtype mili reads, and
nothing it would have to ignore without saying so.
"""

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from numpy.typing import NDArray

from mili.config import ModelConfig
from mili.config._fields import read_json_object
from mili.errors import ConfigError, WeightError
from mili.models._safetensors import NUMPY_DTYPES, TensorFile

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"
_LM_HEAD = "lm_head.weight"
_BUFFERS = re.compile(r".*\.rotary_emb\.inv_freq")  # saved by old versions of transformers; derived from the config


def expected_tensors(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Checkpoint name -> shape of every tensor the model needs; matrices are [out, in]."""
    hidden, inter, head_dim = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head_dim, config.num_key_value_heads * head_dim
    layer: dict[str, tuple[int, ...]] = {
        "input_layernorm.weight": (hidden,),
        "self_attn.q_proj.weight": (q_size, hidden),
        "self_attn.k_proj.weight": (kv_size, hidden),
        "self_attn.v_proj.weight": (kv_size, hidden),
        "self_attn.q_norm.weight": (head_dim,),
        "self_attn.k_norm.weight": (head_dim,),
        "self_attn.o_proj.weight": (hidden, q_size),
        "post_attention_layernorm.weight": (hidden,),
        "mlp.gate_proj.weight": (inter, hidden),
        "mlp.up_proj.weight": (inter, hidden),
        "mlp.down_proj.weight": (hidden, inter),
    }
    if config.attention_bias:
        layer |= {f"self_attn.{x}_proj.bias": layer[f"self_attn.{x}_proj.weight"][:1] for x in "qkvo"}
    tensors: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        "model.norm.weight": (hidden,),
    }
    if not config.tie_word_embeddings:
        tensors[_LM_HEAD] = (config.vocab_size, hidden)
    for number in range(config.num_hidden_layers):
        tensors |= {f"model.layers.{number}.{name}": shape for name, shape in layer.items()}
    return tensors


class Checkpoint:
    """The tensors of one model folder, memory-mapped."""

    def __init__(self, folder: Path | str, config: ModelConfig) -> None:
        """Open and check the checkpoint in ``folder``; only headers are read.

        Raises WeightError naming tensor and file: missing, unexpected, misshapen or mistyped tensors, a shard that is
        absent, truncated or not what the index says.
        """
        self.folder = Path(folder)
        self._files = _open_files(self.folder)  # tensor name -> file
        expected = expected_tensors(config)
        self._check_names(expected, config.tie_word_embeddings)
        self._check_forms(expected)
        self.names = tuple(expected)

    def tensor(self, name: str) -> NDArray[Any]:
        """Read-only memory-mapped view in the shape of ``expected_tensors``; uint16 holds bfloat16 bits."""
        return self._files[name].tensor(name)

    def release(self, name: str) -> None:
        """Drop the tensor's pages from resident memory once it has been copied; views read the file again."""
        self._files[name].release(name)

    def _check_names(self, expected: Iterable[str], tied: bool) -> None:
        if missing := [name for name in expected if name not in self._files]:
            files = {str(file.path) for file in self._files.values()}
            where = files.pop() if len(files) == 1 else f"the {len(files)} safetensors files of {self.folder}"
            hint = "; config.json says tie_word_embeddings false" if missing == [_LM_HEAD] else ""
            raise WeightError(f"missing from {where}: {_enumerate(missing)}{hint}")
        known = set(expected)
        extra = [name for name in self._files if name not in known and not _BUFFERS.fullmatch(name)]
        # A tied model's output matrix is its embedding; some checkpoints store the same matrix under both names.
        if extra := [name for name in extra if not (tied and name == _LM_HEAD)]:
            raise WeightError(
                f"unexpected in {self._files[extra[0]].path}: {_enumerate(extra)}; "
                "config.json does not describe this checkpoint, or it needs something mili does not implement"
            )

    def _check_forms(self, expected: dict[str, tuple[int, ...]]) -> None:
        infos = {name: self._files[name].tensors[name] for name in expected}
        if wrong := [name for name, info in infos.items() if info.dtype not in NUMPY_DTYPES]:
            found = _enumerate([f"{name} ({infos[name].dtype})" for name in wrong])
            raise WeightError(f"{self._files[wrong[0]].path}: mili reads {', '.join(NUMPY_DTYPES)}, found {found}")
        if wrong := [name for name, info in infos.items() if info.shape != expected[name]]:
            found = _enumerate(
                [f"{name} is {list(infos[name].shape)}, config.json says {list(expected[name])}" for name in wrong]
            )
            raise WeightError(f"{self._files[wrong[0]].path}: wrong shape: {found}")


def _open_files(folder: Path) -> dict[str, TensorFile]:
    """Tensor name -> the file that holds it; a single file is preferred to an index, as in transformers."""
    single, index = folder / SINGLE_FILE, folder / INDEX_FILE
    if single.exists():
        file = TensorFile(single)
        return dict.fromkeys(file.tensors, file)
    if not index.exists():
        others = sorted(path.name for pattern in ("*.safetensors", "*.bin", "*.gguf") for path in folder.glob(pattern))
        found = f"; found {_enumerate(others)}" if others else ""
        raise WeightError(f"{folder} has neither {SINGLE_FILE} nor {INDEX_FILE}{found}; mili reads safetensors only")
    weight_map = _read_index(index)
    shards = {name: _open_shard(index, name, weight_map) for name in sorted(set(weight_map.values()))}
    for tensor, shard in weight_map.items():
        if tensor not in shards[shard].tensors:
            raise WeightError(f"{shards[shard].path} does not hold tensor {tensor}, which {index} says it does")
    for shard, file in shards.items():
        for tensor in file.tensors:
            if weight_map.get(tensor) != shard:
                raise WeightError(f"{file.path} holds tensor {tensor}, which {index} does not place there")
    return {tensor: shards[shard] for tensor, shard in weight_map.items()}


def _read_index(index: Path) -> dict[str, str]:
    try:
        weight_map = read_json_object(index).get("weight_map")
    except ConfigError as error:
        raise WeightError(str(error)) from error
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise WeightError(f"{index}: weight_map must map tensor names to file names; download it again")
    for tensor, name in weight_map.items():
        if Path(name).name != name:  # a file outside the folder is never part of the checkpoint
            raise WeightError(f"{index}: tensor {tensor} is placed in {name!r}, which is not a plain file name")
    return weight_map


def _open_shard(index: Path, name: str, weight_map: dict[str, str]) -> TensorFile:
    path = index.parent / name
    if not path.exists():
        tensor = next(tensor for tensor, shard in weight_map.items() if shard == name)
        raise WeightError(f"{path} is missing; {index} places tensor {tensor} in it; download the file")
    return TensorFile(path)


def _enumerate(names: list[str], limit: int = 8) -> str:
    """The names, shortened to a readable number of them."""
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
