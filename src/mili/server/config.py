"""`ServerConfig`: every setting of the server that is not the engine's.

Imports no web framework, so the command line can show the defaults. Invariant: a `ServerConfig` that exists is valid.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from mili.errors import ConfigError

LogFormat = Literal["text", "json"]
_PREFIX = re.compile(r"[a-zA-Z_][a-zA-Z0-9_]*")


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerConfig:
    """Settings of one server. Times in seconds, sizes in bytes."""

    host: str = "127.0.0.1"
    port: int = 8000  # 0 lets the system choose
    served_model_name: str | None = None  # the model's name in the API; None for the checkpoint's own
    api_keys: tuple[str, ...] = field(default=(), repr=False)  # any of them opens the server; none: no key is asked for
    allowed_origins: tuple[str, ...] = ()  # of cross-origin requests by browsers; none: no CORS headers
    max_queue: int = 256  # completions that may wait while others run
    max_event_rate: float | None = None  # a second, of all streams, but for the first and last of each; None: by device
    max_body_bytes: int = 4 << 20
    max_header_bytes: int = 32 << 10
    read_timeout: float = 30.0  # for a request's headers to be complete, and again for its body
    write_timeout: float = 60.0  # for a client to take sent data, and to be silent on the network
    keep_alive: float = 75.0  # for the next request on an open connection
    drain_timeout: float = 30.0  # for running requests to finish after SIGTERM
    stall_timeout: float = 30.0  # without a finished step, with work to do, until /ready says 503
    log_format: LogFormat = "text"
    access_log: bool = True
    metrics_prefix: str = "mili"
    reasoning_content: bool = False  # also write the reasoning under the name `reasoning_content`
    tracing: bool = False  # OpenTelemetry spans; also switched on by OTEL_EXPORTER_OTLP_ENDPOINT

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ConfigError(f"port must be 0 to 65535, got {self.port}")
        if self.max_queue < 0:
            raise ConfigError(f"max_queue must be at least 0, got {self.max_queue}")
        if self.max_event_rate is not None and not self.max_event_rate > 0:
            raise ConfigError(f"max_event_rate must be above 0 per second, got {self.max_event_rate}")
        for name in ("max_body_bytes", "max_header_bytes", "read_timeout", "write_timeout", "keep_alive"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"{name} must be positive, got {getattr(self, name)}")
        if self.stall_timeout <= 0:
            raise ConfigError(f"stall_timeout must be positive, got {self.stall_timeout}")
        if self.drain_timeout < 0:
            raise ConfigError(f"drain_timeout must be at least 0, got {self.drain_timeout}")
        if self.log_format not in ("text", "json"):
            raise ConfigError(f"log_format must be 'text' or 'json', got {self.log_format!r}")
        if not _PREFIX.fullmatch(self.metrics_prefix):
            raise ConfigError(f"metrics_prefix must be a name such as mili or vllm, got {self.metrics_prefix!r}")
        if any(not key or not key.isascii() or not key.isprintable() or " " in key for key in self.api_keys):
            raise ConfigError("an API key must be printable ASCII without spaces and not empty")

    def model_name(self, model: str) -> str:
        """The name of `model` in the API: the configured one, or its own; of a folder its last part, never its path."""
        if self.served_model_name is not None:
            return self.served_model_name
        return Path(model).resolve().name if Path(model).exists() else model


def read_keys(file: Path) -> tuple[str, ...]:
    """The API keys in a file, one a line; blank lines and lines that begin with # are skipped. ConfigError if none."""
    lines = (line.strip() for line in file.read_text(encoding="utf-8").splitlines())
    keys = tuple(line for line in lines if line and not line.startswith("#"))
    if not keys:  # a secret that is missing must not open the server
        raise ConfigError("the API key file holds no key: write one key a line")
    return keys
