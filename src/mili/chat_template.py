"""Chat messages to prompt text: a checkpoint's Jinja template, rendered in a sandbox.

A template is code from whoever published the checkpoint, or from whoever sent the request. It runs in Jinja's immutable
sandbox and sees plain JSON values only, so it can reach no Python object of ours; it can still loop for long. What it
renders equals what transformers renders (``transformers.utils.chat_template_utils``, studied for the filters, globals
and the rules of ``continue_final_message``).

Knows nothing of tokens, vocabularies or where a template was found. Invariant: the caller's messages are never
modified, and everything that goes wrong in a template is a `RequestError`.
"""

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox
import jinja2.utils

from mili.errors import RequestError

Message = Mapping[str, Any]

# Names under which clients send a message's reasoning; templates read the first, gpt-oss's read the second.
_REASONING_FIELDS = ("reasoning_content", "thinking", "reasoning")

# Marks where the final message ends in the rendered text. Its own trailing space shows whether the template strips.
_END_MARK = "CONTINUE_FINAL_MESSAGE_TAG "


class ChatTemplate:
    """One compiled template. Immutable, safe to share between threads."""

    def __init__(self, source: str) -> None:
        """Compile `source`; raises `RequestError` when it is not valid Jinja."""
        self._source = source
        try:
            self._template = _Sandbox().from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise RequestError(f"the chat template is not valid Jinja: {error}") from error

    def render(
        self,
        messages: Sequence[Message],
        *,
        tools: Sequence[Mapping[str, Any]] | None = None,
        add_generation_prompt: bool = True,
        continue_final_message: bool | str = False,
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """The prompt for `messages`.

        `continue_final_message` leaves the last message open so that the model goes on writing it; a string names the
        field to continue instead of "content". `variables` are further names the template may read, such as
        `enable_thinking`. Raises `RequestError` naming the bad message or variable, or with what the template said.
        """
        if continue_final_message and add_generation_prompt:
            raise RequestError(
                "continue_final_message and add_generation_prompt exclude each other: the first extends the last "
                "message, the second starts a new one; pass add_generation_prompt=False to continue"
            )
        chat = [_message(i, message) for i, message in enumerate(_checked(messages))]
        final_text = ""
        if continue_final_message:
            field = continue_final_message if isinstance(continue_final_message, str) else "content"
            final_text = self._mark_end(chat[-1], field)
        for message in chat:
            # OpenAI clients send a tool call with content null; Qwen's templates add strings to it.
            if message["role"] == "assistant" and message.get("tool_calls"):
                message.setdefault("content", "")
        context = {"messages": chat, "tools": _tools(tools), "add_generation_prompt": add_generation_prompt}
        if taken := sorted(context.keys() & (variables or {}).keys()):
            raise RequestError(
                f"template variables may not be called {', '.join(taken)}: those have their own argument"
            )
        context |= {"documents": None} | _plain(variables or {}, "a template variable")
        try:
            text = self._template.render(context)
        except Exception as error:  # the template is foreign code: whatever it raises is the request's fault
            problem = str(error) if isinstance(error, jinja2.TemplateError) else f"{type(error).__name__}: {error}"
            raise RequestError(f"the chat template refused these messages: {problem}") from error
        return _cut_at_mark(text, final_text) if continue_final_message else text

    def _mark_end(self, message: dict[str, Any], field: str) -> str:
        """Append the end mark to the `field` of the final message, in place; returns its text without the mark."""
        value = message.get(field)
        if value is None:
            raise RequestError(f"continue_final_message: the final message has no {field!r} to continue")
        # Reasoning sits under several names; mark every copy, the template reads one of them.
        aliases = _REASONING_FIELDS if field in _REASONING_FIELDS else (field,)
        fields = [name for name in aliases if message.get(name) == value]
        if not any(name in self._source for name in fields):
            raise RequestError(f"continue_final_message: the chat template does not read {field!r}")
        if isinstance(value, str):
            message.update({name: value + _END_MARK for name in fields})
            return value
        for part in reversed(value if isinstance(value, list) else []):
            if isinstance(part, dict) and isinstance(part.get("text"), str):
                text: str = part["text"]
                part["text"] = text + _END_MARK
                return text
        raise RequestError(f"continue_final_message: the final message's {field!r} holds no text to continue")


def _cut_at_mark(text: str, final_text: str) -> str:
    """`text` up to the end mark; without the whitespace before it when the template strips its messages."""
    mark = _END_MARK.rstrip()
    end = text.rfind(mark)
    if end < 0 or final_text.strip() not in text:
        raise RequestError(
            "continue_final_message: the final message does not appear in the rendered chat; this chat template "
            "rewrites it, so it cannot be continued"
        )
    return text[:end] if text.startswith(_END_MARK, end) else text[:end].rstrip()


def _checked(messages: Any) -> Sequence[Any]:
    if not isinstance(messages, list | tuple):
        raise RequestError(
            f"messages must be a list of {{'role': ..., 'content': ...}} dicts, got {type(messages).__name__}"
        )
    if not messages:
        raise RequestError("messages is empty: a chat needs at least one message")
    return messages


def _message(index: int, message: Any) -> dict[str, Any]:
    """A plain copy of one message, checked, without its null fields and with its reasoning under every usual name."""
    where = f"messages[{index}]"
    if not isinstance(message, Mapping):
        raise RequestError(f"{where} must be a dict with 'role' and 'content', got {type(message).__name__}")
    plain: dict[str, Any] = {key: value for key, value in _plain(message, where).items() if value is not None}
    if not isinstance(plain.get("role"), str):
        raise RequestError(f"{where} has no 'role' string; use 'system', 'user', 'assistant' or 'tool'")
    if not isinstance(plain.get("content", ""), str | list):
        raise RequestError(
            f"{where}['content'] must be a string or a list of parts, got {type(plain['content']).__name__}"
        )
    reasoning = next((plain[name] for name in _REASONING_FIELDS if name in plain), None)
    if reasoning is not None:
        plain = {"thinking": reasoning, **plain, "reasoning_content": reasoning}
    return plain


def _tools(tools: Any) -> list[Any] | None:
    if tools is None:
        return None
    if not isinstance(tools, list | tuple) or not all(isinstance(tool, Mapping) for tool in tools):
        raise RequestError("tools must be a list of dicts, each the JSON schema of one function")
    return [_plain(tool, f"tools[{i}]") for i, tool in enumerate(tools)]


def _plain(value: Any, where: str) -> Any:
    """A copy of `value` in exact JSON types; subclasses (enums, for one) could carry methods into the sandbox."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return int.__int__(value)
    if isinstance(value, float):
        return float.__float__(value)
    try:
        if isinstance(value, Mapping):
            if bad := [key for key in value if not isinstance(key, str)]:
                raise RequestError(f"{where} has the key {bad[0]!r}; keys must be strings")
            return {str.__str__(key): _plain(item, where) for key, item in value.items()}
        if isinstance(value, list | tuple):
            return [_plain(item, where) for item in value]
        if callable(getattr(value, "model_dump", None)):  # pydantic, as the openai client returns
            return _plain(value.model_dump(), where)
    except RecursionError as error:
        raise RequestError(f"{where} is nested too deeply or contains itself") from error
    raise RequestError(f"{where} holds a {type(value).__name__}; only JSON values can be rendered")


class _Namespace(jinja2.utils.Namespace):
    """`namespace()` whose attributes cannot shadow Python's internals."""

    def __init__(*args: Any, **kwargs: Any) -> None:
        # No named `self`: a template may write namespace(self=...), as Jinja's own allows.
        self, initial = args[0], dict(*args[1:], **kwargs)
        for name in initial:
            _check_name(name)
        jinja2.utils.Namespace.__init__(self, initial)

    def __setitem__(self, name: str, value: Any) -> None:
        _check_name(name)
        super().__setitem__(name, value)


def _check_name(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(f"a namespace cannot hold the underscored name {name!r}")


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's tokens for training; here it renders its body."""

    tags = {"generation"}  # noqa: RUF012  the attribute Jinja reads

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Sandbox(jinja2.sandbox.ImmutableSandboxedEnvironment):
    """The environment templates are written for: block trimming, loop controls, unescaped JSON."""

    def __init__(self) -> None:
        super().__init__(trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols])
        self.filters["tojson"] = _tojson
        self.globals.update(
            raise_exception=_raise_exception, strftime_now=_strftime_now, dict=_dict, namespace=_Namespace
        )

    def unsafe_undefined(self, obj: Any, attribute: str) -> NoReturn:
        """Refuse at once; Jinja would hand back an undefined that renders as nothing until it is used."""
        raise jinja2.exceptions.SecurityError(f"access to attribute {attribute!r} of a {type(obj).__name__} is unsafe")


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes < > & ' for HTML, which the model was not trained on.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _dict(*args: Any, **kwargs: Any) -> dict[Any, Any]:
    # A function, not the type: the type would offer the template its class attributes.
    return dict(*args, **kwargs)
