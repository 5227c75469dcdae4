"""Text to token ids and back: a checkpoint's ``tokenizer.json`` and its chat template.

The work is done by the `tokenizers` library; this file reads the folder as transformers does (special tokens, BOS and
EOS switches, where a chat template may be) so that token ids equal those of ``AutoTokenizer``.

Knows nothing of requests or of the model, not even the size of its padded vocabulary. Only byte-level BPE is accepted,
the kind every Qwen3 checkpoint has: there a token is a fixed string of bytes, so text can be decoded token by token.
Invariant: a `Tokenizer` never changes after it is built, so threads may share one.
"""

import functools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Self, overload

import tokenizers
from tokenizers import AddedToken, decoders

from mili.chat_template import ChatTemplate, Message
from mili.errors import ConfigError, RequestError

# Named special tokens of tokenizer_config.json; the chat template sees those that are set under these names.
_NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


class Tokenizer:
    """One checkpoint's vocabulary and chat format."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        config: Mapping[str, Any] | None = None,
        chat_templates: Mapping[str, str] | None = None,
    ) -> None:
        """Wrap `backend`, which this object then owns, under the fields of a ``tokenizer_config.json``.

        `chat_templates` maps names to Jinja text; "default" is used, or "tool_use" where there are tools. Raises
        `ConfigError` when the vocabulary is not byte-level or the config contradicts it.
        """
        config = config or {}
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise ConfigError(
                f"tokenizer.json: decoder is {type(backend.decoder).__name__}, expected ByteLevel; "
                "mili reads the byte-level BPE tokenizers of Qwen3 only"
            )
        # Cutting and padding are a batch's business; a file saved by a training script may ask for both.
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = bool(config.get("split_special_tokens", False))
        named = {name: _token_text(config[name], name) for name in _NAMED_TOKENS if config.get(name) is not None}
        _add_tokens(backend, config, list(named.values()))
        self._backend = backend
        self._named_tokens = named
        self._letters = _byte_of_letter()
        self._bytes: dict[int, bytes] = {}  # filled on first use: building all 150k entries costs 0.3 s
        self._templates = dict(chat_templates or {})
        self._compile = functools.lru_cache(maxsize=8)(ChatTemplate)
        self._bos, self._eos = self._edge_tokens(config)
        self.special_ids = frozenset(i for i, token in backend.get_added_tokens_decoder().items() if token.special)
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.eos_token = named.get("eos_token")
        self.eos_token_id = None if self.eos_token is None else self.token_to_id(self.eos_token)

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Read ``tokenizer.json`` and, where present, ``tokenizer_config.json`` and the chat template files.

        Raises `ConfigError` naming the file that is missing or damaged.
        """
        folder = Path(folder)
        path = folder / "tokenizer.json"
        if not path.is_file():
            raise ConfigError(f"{folder} has no tokenizer.json; mili needs that file of the checkpoint")
        try:
            backend = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            raise ConfigError(f"{path} is not a readable tokenizer ({error}); download the file again") from error
        config = _read_config(folder / "tokenizer_config.json")
        return cls(backend, config, _read_chat_templates(folder, config))

    def to_json(self) -> str:
        """The vocabulary as the text of a ``tokenizer.json``, with the tokens that only the config lists."""
        return self._backend.to_str()

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. Special tokens written out in it become their own ids.

        `add_special_tokens` adds what the checkpoint puts around every text (for Qwen3 nothing). Raises `RequestError`
        when `text` is not a string of Unicode characters.
        """
        if not isinstance(text, str):
            raise RequestError(f"text to encode must be a str, got {type(text).__name__}")
        try:
            # Of a batch of one, because `encode` keeps Python's other threads waiting all the while.
            added = add_special_tokens and self._bos is None
            (encoding,) = self._backend.encode_batch_fast([text], add_special_tokens=added)
        except TypeError as error:
            lone = next((i for i, letter in enumerate(text) if "\ud800" <= letter <= "\udfff"), None)
            raise RequestError(f"text is not valid Unicode: lone surrogate at character {lone}") from error
        if add_special_tokens and self._bos is not None:
            return [*self._bos, *encoding.ids, *self._eos]
        ids: list[int] = encoding.ids
        return ids

    def decode(self, token_ids: Sequence[int], skip_special_tokens: bool = False) -> str:
        """Text of `token_ids`; ids without a token give nothing, incomplete UTF-8 gives U+FFFD."""
        try:
            return self._backend.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        except OverflowError as error:
            bad = next(i for i in token_ids if not 0 <= i < 2**32)
            raise RequestError(f"token ids must be between 0 and 2**32 - 1, got {bad}") from error

    def token_bytes(self, token_id: int) -> bytes:
        """The bytes `token_id` stands for, part of a character perhaps; empty where the vocabulary has no token."""
        known = self._bytes.get(token_id)
        if known is None:
            token = self._backend.id_to_token(token_id) or ""
            letters = self._letters
            try:
                known = bytes([letters[letter] for letter in token])
            except KeyError:  # an added token is stored as plain text
                known = token.encode()
            self._bytes[token_id] = known
        return known

    def token_text(self, token_id: int) -> str:
        """The text of one token by itself, special ones included: what a log-probability is reported under."""
        return self.token_bytes(token_id).decode("utf-8", "replace")

    def token_to_id(self, token: str) -> int | None:
        """The id of `token` as the vocabulary spells it ("</think>", "Ġthe"), or None."""
        return self._backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether `skip_special_tokens` leaves this token out."""
        return token_id in self.special_ids

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        chat_template: str | None = ...,
        add_generation_prompt: bool = ...,
        continue_final_message: bool | str = ...,
        *,
        tokenize: Literal[True] = ...,
        **chat_template_kwargs: Any,
    ) -> list[int]: ...

    @overload
    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = ...,
        chat_template: str | None = ...,
        add_generation_prompt: bool = ...,
        continue_final_message: bool | str = ...,
        *,
        tokenize: Literal[False],
        **chat_template_kwargs: Any,
    ) -> str: ...

    def apply_chat_template(
        self,
        messages: Sequence[Message],
        tools: Sequence[Mapping[str, Any]] | None = None,
        chat_template: str | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        *,
        tokenize: bool = True,
        **chat_template_kwargs: Any,
    ) -> list[int] | str:
        """The prompt for a chat, as token ids or (``tokenize=False``) as text.

        `chat_template` is Jinja text, or the name of one of the checkpoint's templates. Further keywords, such as
        ``enable_thinking=False``, are variables of the template; one that it does not read changes nothing. Raises
        `RequestError` as `ChatTemplate.render` does, and when the checkpoint has no template.
        """
        template = self._compile(self._find_template(chat_template, tools))
        text = template.render(
            messages,
            tools=tools,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=continue_final_message,
            variables={**self._named_tokens, **chat_template_kwargs},
        )
        return self.encode(text, add_special_tokens=False) if tokenize else text

    def _find_template(self, wanted: str | None, tools: object) -> str:
        if wanted is not None:
            if not isinstance(wanted, str):
                raise RequestError(f"chat_template must be Jinja text or a name, got {type(wanted).__name__}")
            return self._templates.get(wanted, wanted)
        for name in ("tool_use", "default") if tools is not None else ("default",):
            if name in self._templates:
                return self._templates[name]
        names = ", ".join(sorted(self._templates)) or "none"
        raise RequestError(f"the checkpoint has no default chat template (it has: {names}); pass chat_template=")

    def _edge_tokens(self, config: Mapping[str, Any]) -> tuple[list[int] | None, list[int]]:
        """Ids that the config puts before and after every text; (None, []) where tokenizer.json decides."""
        if "add_bos_token" not in config and "add_eos_token" not in config:
            return None, []
        edges: list[list[int]] = []
        for name in ("bos_token", "eos_token"):
            text = self._named_tokens.get(name) if config.get(f"add_{name}") else None
            token_id = None if text is None else self.token_to_id(text)
            edges.append([] if token_id is None else [token_id])
        return edges[0], edges[1]


def _byte_of_letter() -> dict[str, int]:
    """The letters byte-level BPE writes bytes with: printable Latin-1 as itself, the rest from U+0100 up (GPT-2)."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}


def _token_text(value: Any, field: str) -> str:
    """A special token of the config: plain text, or the text inside a serialised AddedToken."""
    text = value.get("content") if isinstance(value, Mapping) else value
    if not isinstance(text, str):
        raise ConfigError(f"tokenizer_config.json: {field} must be a string, got {value!r}")
    return text


def _add_tokens(backend: tokenizers.Tokenizer, config: Mapping[str, Any], named: list[str]) -> None:
    """Give `backend` the added tokens that only the config lists, and mark the named ones special."""
    listed = config.get("added_tokens_decoder") or {}
    flags = ("lstrip", "rstrip", "single_word", "normalized", "special")
    try:
        entries = sorted((int(token_id), entry["content"], entry) for token_id, entry in listed.items())
        tokens = [AddedToken(text, **{k: entry[k] for k in flags if k in entry}) for _, text, entry in entries]
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"tokenizer_config.json: added_tokens_decoder is malformed ({error!r})") from error
    backend.add_tokens(tokens)
    extra = config.get("extra_special_tokens") or config.get("additional_special_tokens") or []
    extra = extra.values() if isinstance(extra, Mapping) else extra
    texts = named + [_token_text(value, "extra_special_tokens") for value in extra]
    backend.add_special_tokens([token for token in tokens if token.special] + texts)
    for token_id, text, _ in entries:
        if backend.token_to_id(text) != token_id:
            raise ConfigError(
                f"{text!r} is token {token_id} in tokenizer_config.json but {backend.token_to_id(text)} in "
                "tokenizer.json; the files belong to different checkpoints"
            )


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ConfigError(f"{path} is not valid JSON ({error})") from error
    if not isinstance(config, dict):
        raise ConfigError(f"{path} must hold a JSON object, got {type(config).__name__}")
    return config


def _read_chat_templates(folder: Path, config: Mapping[str, Any]) -> dict[str, str]:
    """Templates by name. Files win over the config's field, which is one text or a list of named ones."""
    files = {path.stem: path for path in sorted((folder / "additional_chat_templates").glob("*.jinja"))}
    if (folder / "chat_template.jinja").is_file():
        files["default"] = folder / "chat_template.jinja"
    if files:
        try:
            return {name: path.read_text(encoding="utf-8") for name, path in files.items()}
        except UnicodeDecodeError as error:
            raise ConfigError(f"a chat template file of {folder} is not UTF-8 text ({error})") from error
    field = config.get("chat_template")
    if field is None:
        return {}
    if isinstance(field, str):
        return {"default": field}
    try:
        return {entry["name"]: entry["template"] for entry in field}
    except (TypeError, KeyError) as error:
        raise ConfigError("tokenizer_config.json: chat_template must be a string or a list of name/template") from error
