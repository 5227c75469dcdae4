"""What a step of the engine tells its caller: which requests moved on. Names and numbers only."""

from typing import NamedTuple


class StepStats(NamedTuple):
    """What one step did, for metrics."""

    num_tokens: int  # computed, of prompts and of outputs
    inter_token_seconds: list[float]  # since the token before, for each that was not its completion's first


class Progress(NamedTuple):
    """Which requests a step moved on."""

    advanced: list[str]  # got a token; those that finished are among them
    finished: list[str]  # ended, or were taken down by an exception that `take` raises
    stats: StepStats = StepStats(0, [])
