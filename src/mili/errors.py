"""Every exception mili raises on purpose.

    MiliError
    ├── ConfigError (also ValueError)       an engine option or a config field is wrong or does not fit
    │   └── UnsupportedModelError           the checkpoint asks for something mili does not implement
    ├── WeightError                         a tensor or a weight file is missing, damaged or of the wrong form
    ├── RequestError (also ValueError)      a prompt or a parameter of one request is wrong
    ├── QueueFullError                      too many requests are waiting; try again later
    └── EngineDeadError                     the engine has died or was closed

The two that describe a bad value are also ``ValueError``, so that callers used to that name need not learn ours.
Messages give the value received, the limit it broke and what to do about it. A broken invariant of mili itself is not
in this tree: that is an ``assert``.
"""


class MiliError(Exception):
    """Base of every exception raised by mili."""


class ConfigError(MiliError, ValueError):
    """A bad engine option, model name or ``config.json`` field; nothing has been loaded yet."""


class UnsupportedModelError(ConfigError):
    """The checkpoint is well formed but needs an architecture or feature that mili does not implement."""


class WeightError(MiliError):
    """A tensor or weight file is missing, unexpected, truncated, or has the wrong shape or dtype."""


class RequestError(MiliError, ValueError):
    """One request cannot be served: bad prompt or parameter. The engine goes on serving the others."""


class QueueFullError(MiliError):
    """The engine has as many unfinished requests as it may have; the same request can be served later."""


class EngineDeadError(MiliError):
    """The engine serves nothing any more; its cause is chained."""
