"""A request's `tools` and `tool_choice`: checked, and turned into the grammar that keeps the model to them.

The tools reach the model through the chat template, which is given them as the caller wrote them. Knows nothing of
HTTP, tokens or how a call is read back out of the answer. Invariant: what `check_tools` returned can be written into a
grammar without escaping.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from mili.errors import RequestError

_NAME = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_MODES = ("none", "auto", "required")


@dataclass(frozen=True, slots=True)
class FunctionTool:
    """One function the model may call."""

    name: str
    parameters: dict[str, Any]  # a JSON schema whose type is "object"
    strict: bool  # every call's arguments must fit the schema, also when the model is free not to call


@dataclass(frozen=True, slots=True)
class ToolChoice:
    """Whether the model may or must call a function, and which one."""

    mode: Literal["none", "auto", "required"]
    name: str | None = None  # with "required": this function and no other


def check_tools(tools: Any) -> list[FunctionTool]:
    """Read OpenAI's list of function tools; None is no tools.

    Raises `RequestError` that begins with the path of the field, "tools[0].function.name".
    """
    if tools is None:
        return []
    if not isinstance(tools, list):
        raise RequestError(f"tools must be a list, got {_show(tools)}")
    functions = [_function(tool, f"tools[{i}]") for i, tool in enumerate(tools)]
    first: dict[str, int] = {}
    for i, function in enumerate(functions):
        if first.setdefault(function.name, i) != i:
            raise RequestError(
                f"tools[{i}].function.name is {function.name!r}, as in tools[{first[function.name]}]: give each its own"
            )
    return functions


def check_tool_choice(choice: Any, functions: Sequence[FunctionTool]) -> ToolChoice:
    """Read `tool_choice`: None means "auto" where there are tools, else "none".

    Raises `RequestError` that begins with the path of the field.
    """
    if choice is None:
        return ToolChoice("auto" if functions else "none")
    if isinstance(choice, dict):
        name = _called_function(choice)
        if name not in [function.name for function in functions]:
            known = ", ".join(function.name for function in functions) or "there are none"
            raise RequestError(f"tool_choice.function.name must be one of tools ({known}), got {_show(name)}")
        return ToolChoice("required", name)
    if choice not in _MODES:
        raise RequestError(
            f'tool_choice must be {", ".join(_MODES)} or {{"type": "function", "function": {{"name": ...}}}}, '
            f"got {_show(choice)}"
        )
    if choice == "required" and not functions:
        raise RequestError("tool_choice is 'required' but the request has no tools: add tools or leave it out")
    return ToolChoice(choice)


def tool_call_grammar(functions: Sequence[FunctionTool], choice: ToolChoice, parallel: bool = True) -> str | None:
    """The answers that `choice` allows, as a Lark grammar of llguidance; None where any answer is.

    "required" gives one call, or with `parallel` one or more; "auto" needs a grammar only for `strict` functions or to
    keep to one call. There the answer may begin with text, and functions that are not strict take any object.
    """
    free = choice.mode == "auto"
    if not functions or choice.mode == "none" or (free and parallel and not any(f.strict for f in functions)):
        return None
    offered = [function for function in functions if choice.name in (None, function.name)]
    calls = 'call ("\\n" call)*' if parallel else "call"
    bodies = "\n    | ".join(_body(function, bool(function.strict or not free)) for function in offered)
    return "\n".join(
        [
            f"start: TEXT ({calls})?" if free else f'start: "\\n\\n"? {calls}',  # newlines: those after </think>
            *(["TEXT: /(.|\\n)*/"] if free else []),
            'call: <tool_call> "\\n" body "}\\n" </tool_call>',
            f"body: {bodies}",
        ]
    )


def _body(function: FunctionTool, strict: bool) -> str:
    schema = json.dumps(function.parameters if strict else {"type": "object"})
    return f'"{{\\"name\\": \\"{function.name}\\", \\"arguments\\": " %json {schema}'


def _function(tool: Any, path: str) -> FunctionTool:
    if not isinstance(tool, dict):
        raise RequestError(f"{path} must be an object, got {_show(tool)}")
    if tool.get("type") != "function":
        raise RequestError(f"{path}.type must be 'function', got {_show(tool.get('type'))}")
    function = tool.get("function")
    path += ".function"
    if not isinstance(function, dict):
        raise RequestError(f"{path} must be an object, got {_show(function)}")
    name, description, strict = (function.get(key) for key in ("name", "description", "strict"))
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise RequestError(f"{path}.name must be 1 to 64 letters, digits, underscores or hyphens, got {_show(name)}")
    if not isinstance(description, str | None):
        raise RequestError(f"{path}.description must be a string, got {_show(description)}")
    if not isinstance(strict, bool | None):
        raise RequestError(f"{path}.strict must be true or false, got {_show(strict)}")
    return FunctionTool(name, _parameters(function, f"{path}.parameters"), strict is True)


def _parameters(function: dict[str, Any], path: str) -> dict[str, Any]:
    """The schema of the arguments; a function without one takes none."""
    parameters = function.get("parameters")
    if parameters is None:
        return {"type": "object", "additionalProperties": False}
    if not isinstance(parameters, dict):
        raise RequestError(f"{path} must be a JSON schema object, got {_show(parameters)}")
    if parameters.get("type", "object") != "object":
        raise RequestError(f"{path}.type must be 'object', got {_show(parameters['type'])}")
    return {"type": "object", **parameters}


def _called_function(choice: dict[str, Any]) -> Any:
    if choice.get("type") != "function":
        raise RequestError(f"tool_choice.type must be 'function', got {_show(choice.get('type'))}")
    function = choice.get("function")
    if not isinstance(function, dict):
        raise RequestError(f"tool_choice.function must be an object, got {_show(function)}")
    return function.get("name")


def _show(value: Any) -> str:
    """`value` for an error message, cut to a readable length."""
    text = repr(value)
    return text if len(text) <= 100 else f"{text[:100]}..."
