"""Write chapter 9 from the code: public names, the command line, the HTTP API.

    python docs/reference.py           # write docs/09_api_reference.md
    python docs/reference.py --check   # change nothing; exit 1 if it is out of date

Signatures and fields are the source's own lines, explanations its docstrings, so nothing here can be truer or falser
than the code. Knows Python, click and FastAPI; of mili only where the public names are. Invariant: the text depends on
the code alone, and not on the machine.
"""

import ast
import inspect
import pkgutil
import re
import sys
from collections.abc import Iterator, Mapping
from importlib import import_module
from pathlib import Path
from textwrap import dedent
from typing import Any
from unittest.mock import MagicMock

import click
from click.testing import CliRunner
from fastapi.routing import APIRoute

import mili
import mili.server
from mili import errors
from mili.cli.main import program
from mili.server import protocol_responses
from mili.server.config import ServerConfig
from mili.server.protocol import NO_EFFECT, Body

ROOT = Path(__file__).resolve().parent.parent
CHAPTER = ROOT / "docs" / "09_api_reference.md"

# Not made by callers, but handed to them.
_RETURNED = ("tokenizer.Tokenizer", "prompts.Prompt", "memory.MemoryPlan", "plan.ModelPlan", "engine.StepStats")
_SECTION = re.compile(r"^(Args|Attributes|Raises|Returns):$")
_HELP_WIDTH = 100

_HEAD = """\
# 9. API reference

After this chapter you can look anything up: the public names of Python, the commands, the HTTP API. It is written by
[`docs/reference.py`](reference.py) from signatures, docstrings and `--help`, and a test compares. Names that are not
here may change at any time. Messages are in [chapter 8](08_troubleshooting.md).
"""
_HTTP = """\
## HTTP API

`mili serve` answers on these paths, and on `/` with a page to try the model in a browser. Bodies are JSON objects with
no other fields than those listed; a field that is null counts as left out. A field with the name of one of
[`SamplingParams`](#samplingparams) has its meaning and its range; the rest are OpenAI's, or vLLM's where OpenAI has
none. %s change nothing.

An answer that is not a success is `{"error": {"message", "type", "param", "code"}}`; the statuses and codes are in
[chapter 8](08_troubleshooting.md#codes). A stream is server-sent events: `data: ` and a JSON object, and
`data: [DONE]` at the end of one that succeeded.
"""


def chapter() -> str:
    """The text of chapter 9."""
    parts = [_HEAD, *_python(), *_command_line(), *_http_api()]
    return "\n".join(part.rstrip("\n") + "\n" for part in parts)


def _python() -> Iterator[str]:
    yield "## Python\n"
    public = [getattr(mili, name) for name in mili.__all__ if inspect.isclass(getattr(mili, name))]
    yield "Import them from `mili`; each is loaded when it is first used.\n"
    for cls in public:
        if not issubclass(cls, errors.MiliError):
            yield from _class(cls)
    yield f"### Exceptions\n\n{_docstring(inspect.getdoc(errors) or '')}"
    for name, cls in vars(errors).items():
        if inspect.isclass(cls):
            yield f"- `{name}`: {_docstring(inspect.getdoc(cls) or '')}"
    yield "### What methods return\n\nThese come from mili; nobody needs to make one.\n"
    for name in _RETURNED:
        module, cls_name = name.split(".")
        yield from _class(getattr(import_module(f"mili.{module}"), cls_name), level="####", made_by_callers=False)


def _class(cls: type, level: str = "###", *, made_by_callers: bool = True) -> Iterator[str]:
    """A class with its fields or attributes and its public methods, in the order of the source."""
    source = dedent(inspect.getsource(cls))
    (node,) = ast.parse(source).body
    assert isinstance(node, ast.ClassDef)
    path = Path(inspect.getfile(cls)).relative_to(ROOT)
    yield f"{level} {cls.__name__}\n\n[`{cls.__name__}`](../{path}): {_docstring(inspect.getdoc(cls) or '')}"
    fields = [item for item in node.body if isinstance(item, ast.AnnAssign | ast.Assign)]
    if fields:
        yield _code(_lines(source, fields[0].lineno, fields[-1].end_lineno))
    methods = [item for item in node.body if isinstance(item, ast.FunctionDef | ast.AsyncFunctionDef)]
    for method in methods:
        decorators = {ast.unparse(decorator) for decorator in method.decorator_list}
        public = made_by_callers if method.name == "__init__" else not method.name.startswith("_")
        if public and "overload" not in decorators:
            if method.name != "__init__":
                yield f"{level}# {cls.__name__}.{method.name}\n"
            yield _method(source, method)
            if method.name == "__init__" and (attributes := _attributes(method)):
                yield f"Attributes: {', '.join(attributes)}.\n"


def _method(source: str, method: ast.FunctionDef | ast.AsyncFunctionDef) -> str:
    first = min([method.lineno, *(decorator.lineno for decorator in method.decorator_list)])
    # The header ends where the docstring, or else the body, begins.
    header = _lines(source, first, method.body[0].lineno - 1)
    return f"{_code(header)}\n{_docstring(ast.get_docstring(method) or '')}"


def _attributes(init: ast.FunctionDef | ast.AsyncFunctionDef) -> list[str]:
    """The public attributes that `__init__` sets."""
    found = []
    for statement in init.body:
        targets = statement.targets if isinstance(statement, ast.Assign) else [getattr(statement, "target", None)]
        for target in targets:
            if re.fullmatch(r"self\.[a-z]\w*", "" if target is None else ast.unparse(target)):
                assert isinstance(target, ast.Attribute)
                kind = f": {ast.unparse(statement.annotation)}" if isinstance(statement, ast.AnnAssign) else ""
                found.append(f"`{target.attr}{kind}`")
    return found


def _lines(source: str, first: int, last: int | None) -> str:
    return dedent("\n".join(source.splitlines()[first - 1 : last]))


def _code(text: str, language: str = "py") -> str:
    """A block that docs/run.py leaves alone."""
    return f"```{language}\n{text.rstrip()}\n```\n"


def _docstring(text: str) -> str:
    """Google's sections become lists; the rest is Markdown already."""
    out: list[str] = []
    entries = False
    for line in inspect.cleandoc(text).splitlines():
        if section := _SECTION.match(line):
            entries = True
            out += [f"**{section[1]}**", ""]
        elif entries and (entry := re.match(r"^ {4}(\*{0,2}\w+): (.*)$", line)):
            out.append(f"- `{entry[1]}`: {entry[2]}")
        elif entries and line.startswith(" " * 4):
            out.append(f"  {line.strip()}")
        else:
            entries = entries and not line
            out.append(line)
    return "\n".join(out).replace("``", "`") + "\n"


def _command_line() -> Iterator[str]:
    yield "## Command line\n\nExit codes: 0 done, 1 a fault of mili's, 2 a mistake in what was asked, 130 Ctrl-C.\n"
    yield from _command([], program)


def _command(words: list[str], command: click.Command) -> Iterator[str]:
    """A command's help, and then its own commands'."""
    name = " ".join(["mili", *words])
    result = CliRunner().invoke(program, [*words, "--help"], prog_name="mili", terminal_width=_HELP_WIDTH)
    if result.exception is not None:
        raise RuntimeError(f"{name} --help failed") from result.exception
    yield f"### {name}\n\n{_code(result.output, 'text')}"
    for inner in sorted(command.commands) if isinstance(command, click.Group) else ():
        yield from _command([*words, inner], command.commands[inner])


def _http_api() -> Iterator[str]:
    yield _HTTP % ", ".join(f"`{name}`" for name in NO_EFFECT)
    bodies: dict[str, type[Body]] = {}
    for routes in _routes():
        yield from _route(routes, bodies)
    yield "### Bodies\n"
    parts: dict[str, Any] = {}
    for name, body in bodies.items():
        yield _body(name, body, parts)
    for name in sorted(parts):
        yield f"#### {name}\n\n{_fields(parts[name])}"
    yield "### Answers\n\nAs typed dicts; a field that is `NotRequired` is there when it was asked for.\n"
    source = inspect.getsource(protocol_responses)
    yield _code(source[source.index("\nclass ") :].lstrip())
    yield from _class(ServerConfig)


def _routes() -> list[list[APIRoute]]:
    """The routes of every module that has a router, those of one function together."""
    found: dict[Any, list[APIRoute]] = {}
    for info in pkgutil.iter_modules(mili.server.__path__):
        module = import_module(f"mili.server.{info.name}")
        if make_router := getattr(module, "make_router", None):
            router = make_router(*(MagicMock() for _ in inspect.signature(make_router).parameters))
            for route in router.routes:
                found.setdefault(route.endpoint, []).append(route)
    return sorted(found.values(), key=lambda routes: routes[-1].path)


def _route(routes: list[APIRoute], bodies: dict[str, type[Body]]) -> Iterator[str]:
    *aliases, route = sorted(routes, key=lambda route: route.include_in_schema)
    text = [inspect.getdoc(route.endpoint) or ""]
    if aliases:
        text.append(f"Also at {', '.join(sorted(f'`{alias.path}`' for alias in aliases))}.")
    for parameter in inspect.signature(route.endpoint, eval_str=True).parameters.values():
        if inspect.isclass(parameter.annotation) and issubclass(parameter.annotation, Body):
            name = parameter.annotation.__name__
            bodies[name] = parameter.annotation
            text.append(f"Body: [`{name}`](#{name.lower()}).")
    if success := route.responses.get(200):
        streams = " or a stream" if "text/event-stream" in success.get("content", {}) else ""
        text.append(f"Answer: `{success['model'].__name__}`{streams}.")
    yield f"### {min(route.methods or ())} {route.path_format}\n\n{' '.join(text)}\n"


def _body(name: str, body: type[Body], parts: dict[str, Any]) -> str:
    schema = body.model_json_schema(by_alias=True)
    parts |= schema.pop("$defs", {})
    text = f"#### {name}\n\n{schema['description']}\n\n{_fields(schema)}"
    if body.refused:
        off = [f"`{key}: {_json(value)}`" for key, values in sorted(body.refused.items()) for value in values]
        names = ", ".join(f"`{key}`" for key in sorted(body.refused))
        text += f"\nKnown but not honoured, and refused by name: {names}."
        text += f' Their values for "off" pass: {", ".join(off)}.\n' if off else "\n"
    return text


def _fields(schema: Mapping[str, Any]) -> str:
    required, properties = schema.get("required", ()), schema["properties"]
    types = {key: _type(value) + (", required" if key in required else "") for key, value in properties.items()}
    rows = [f"| `{key}` | {text} |" for key, text in types.items()]
    return "\n".join(["| field | type |", "|---|---|", *rows]) + "\n"


def _type(schema: Mapping[str, Any]) -> str:
    """A JSON schema in a few words; null is left out, because every field may be left out so."""
    if "anyOf" in schema:
        return " or ".join(_type(option) for option in schema["anyOf"] if option.get("type") != "null")
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[`{name}`](#{name.lower()})"
    if "const" in schema or "enum" in schema:
        return " or ".join(f"`{_json(value)}`" for value in schema.get("enum", [schema.get("const")]))
    if schema.get("type") == "array":
        return f"list of {_type(schema['items'])}"
    if schema.get("type") == "object" and isinstance(schema.get("additionalProperties"), dict):
        return f"object of {_type(schema['additionalProperties'])}"
    limit = f", at most {schema['maximum']}" if "maximum" in schema else ""
    return f"{schema.get('type', 'any')}{limit}"


def _json(value: object) -> str:
    return repr(value).replace("'", '"').replace("False", "false").replace("True", "true")


def main(arguments: list[str]) -> int:
    """Write the chapter, or with --check only compare; returns the exit status."""
    text = chapter()
    if arguments != ["--check"]:
        CHAPTER.write_text(text, encoding="utf-8")
    elif not CHAPTER.exists() or CHAPTER.read_text(encoding="utf-8") != text:
        print(f"out of date: {CHAPTER.name}; run python docs/reference.py")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
