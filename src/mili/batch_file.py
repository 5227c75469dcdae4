"""Batch files in OpenAI's form: what a line asks, what a line answers, and how far an earlier run came.

Knows files and JSON; no models and no HTTP. Invariant: line k of an output answers the k-th line of its input that is
not blank, and a line is either written whole or dropped by the next run.
"""

import fcntl
import json
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mili.errors import ConfigError

URLS = ("/v1/chat/completions", "/v1/completions")

_FIELDS = ("custom_id", "method", "url", "body")
_ID = "batch_req_"
_START = f'{{"id": "{_ID}'.encode()  # of every line that we write


@dataclass(frozen=True, slots=True)
class BatchLine:
    """One request of the input."""

    custom_id: str
    url: str
    body: bytes  # JSON


@dataclass(frozen=True, slots=True)
class BadLine:
    """A line of the input that is no request."""

    custom_id: str | None  # None where there is none to be read
    code: str
    message: str


def read_batch(path: Path) -> Iterator[BatchLine | BadLine]:
    """The lines of an input file, blank ones left out; only the `custom_id`s seen so far are held in memory."""
    seen: set[str] = set()
    with path.open("rb") as file:
        for number, raw in enumerate(file, 1):
            if not raw.strip():
                continue
            line = _parse(raw, number)
            if line.custom_id in seen:
                message = f"line {number}: custom_id {line.custom_id!r} is that of an earlier line: make it unique"
                line = BadLine(line.custom_id, "duplicate_custom_id", message)
            elif line.custom_id is not None:
                seen.add(line.custom_id)
            yield line


def _parse(raw: bytes, number: int) -> BatchLine | BadLine:
    try:
        value = json.loads(raw.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        return BadLine(None, "invalid_json_line", f"line {number} is not JSON: {error}")
    if not isinstance(value, dict):
        return BadLine(None, "invalid_json_line", f"line {number} must be a JSON object, got {type(value).__name__}")
    custom_id = value.get("custom_id")
    if not isinstance(custom_id, str):
        return BadLine(None, "invalid_request", f"line {number}: custom_id must be a string, got {custom_id!r}")
    if missing := [name for name in _FIELDS if name not in value]:
        return BadLine(custom_id, "invalid_request", f"line {number}: {' and '.join(missing)} missing")
    if unknown := sorted(value.keys() - set(_FIELDS)):
        message = f"line {number}: unknown {' and '.join(unknown)}; a line has {', '.join(_FIELDS)}"
        return BadLine(custom_id, "invalid_request", message)
    method, url, body = value["method"], value["url"], value["body"]
    if method != "POST":
        return BadLine(custom_id, "invalid_method", f"line {number}: method must be 'POST', got {method!r}")
    if url not in URLS:
        return BadLine(custom_id, "invalid_url", f"line {number}: url must be {' or '.join(URLS)}, got {url!r}")
    if not isinstance(body, dict):
        return BadLine(custom_id, "invalid_request", f"line {number}: body must be an object, got {body!r}")
    if body.get("stream"):
        return BadLine(custom_id, "invalid_request", f"line {number}: a batch has no streams: leave stream out of body")
    return BatchLine(custom_id, url, json.dumps(body).encode())


def answer(custom_id: str, status_code: int, request_id: str, body: Any) -> dict[str, Any]:
    """The output line of a request that was made, whether it succeeded or not."""
    response = {"status_code": status_code, "request_id": request_id, "body": body}
    return {"id": f"{_ID}{uuid.uuid4().hex}", "custom_id": custom_id, "response": response, "error": None}


def refusal(line: BadLine) -> dict[str, Any]:
    """The output line of a bad line."""
    error = {"code": line.code, "message": line.message}
    return {"id": f"{_ID}{uuid.uuid4().hex}", "custom_id": line.custom_id, "response": None, "error": error}


class BatchOutput:
    """The output file of a batch, begun or gone on with: `num_done` of the input's `num_lines` are answered in it.

    A context manager; the file is locked until its end.
    """

    def __init__(self, input_path: Path, output_path: Path) -> None:
        """Open the output and drop what an interrupted run left of its last line.

        Raises:
            ConfigError: The output is in use, or its lines are not answers to this input; it is left as it was.
        """
        self._path = output_path
        with input_path.open("rb"):  # first, so that no output is made for an input that is not there
            self._file = output_path.open("a+b")
        try:
            if output_path.samefile(input_path):
                raise ConfigError(f"{output_path} is both input and output: name another output file")
            try:
                fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise ConfigError(f"{output_path} is being written by another run: wait, or name another") from error
            self.num_done, self.num_lines, end = self._compare(input_path)
            self._file.truncate(end)
        except BaseException:
            self._file.close()
            raise

    def write(self, line: dict[str, Any]) -> None:
        """Append one line and hand it to the operating system."""
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _compare(self, input_path: Path) -> tuple[int, int, int]:
        """How many lines the output has and the input has, and where the last whole line of the output ends."""
        lines = read_batch(input_path)
        num_done = end = 0
        self._file.seek(0)
        for raw in self._file:
            torn = not raw.endswith(b"\n")
            if torn and (raw.startswith(_START) or _START.startswith(raw)):
                break
            line = next(lines, None)
            if torn or line is None or not _answers(raw, line):
                expected = "nothing" if line is None else f"custom_id {line.custom_id!r}"
                raise ConfigError(
                    f"{self._path} line {num_done + 1} is no answer to the input, which has {expected} there: "
                    "go on with the input that it was made from, or name another output file"
                )
            num_done += 1
            end += len(raw)
        return num_done, num_done + sum(1 for _ in lines), end


def _answers(raw: bytes, line: BatchLine | BadLine) -> bool:
    try:
        value = json.loads(raw)
    except (ValueError, RecursionError):
        return False
    return raw.startswith(_START) and value.get("custom_id") == line.custom_id
