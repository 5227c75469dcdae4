"""Log lines, as text or as one JSON object each: the server's own, and one for each HTTP request.

Knows how a line looks, not when one is written. Invariant: a line is one line, whatever a client sent; keys, queries,
prompts and outputs are in none.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from urllib.parse import quote

from mili.server.config import LogFormat
from mili.server.middleware import Exchange

_ACCESS = logging.getLogger("mili.access")


def log_exchange(exchange: Exchange) -> None:
    """Write a request's line; those of Prometheus and of probes that succeed only at level DEBUG."""
    level = logging.DEBUG if exchange.is_probe and exchange.status < 400 else logging.INFO
    fields = {
        "client": exchange.client,
        "method": exchange.method,
        "path": quote(exchange.path),
        "status": exchange.status,
        "duration_ms": round(exchange.seconds * 1000, 3),
        "request_id": exchange.request_id,
    }
    text = "%(client)s %(method)s %(path)s %(status)d %(duration_ms).1f ms %(request_id)s"
    _ACCESS.log(level, text, fields, extra={"fields": fields})


class TextFormatter(logging.Formatter):
    """`2026-01-31T12:00:00.123Z INFO mili.access ...`; a traceback follows on lines of its own."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = f"{_time(record)} {record.levelname} {record.name} {' '.join(record.getMessage().split())}"
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


class JsonFormatter(logging.Formatter):
    """One object a line: time, level, logger, message, a request's fields, and the traceback if there is one."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_logging(log_format: LogFormat) -> None:
    """Send every log line of this process to stderr in the given format; for the process that is the server."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter() if log_format == "json" else TextFormatter())
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    logging.captureWarnings(True)
    logging.getLogger("mili").setLevel(logging.INFO)


def _time(record: logging.LogRecord) -> str:
    moment = datetime.fromtimestamp(record.created, UTC)
    return moment.isoformat(timespec="milliseconds").replace("+00:00", "Z")
