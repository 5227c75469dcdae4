"""`mili bench`: the benchmarks, one sub-command each; without one, `latency`.

Knows their names only. All but `serve` time the public `LLM`, so they measure what a caller gets.
"""

import click

from mili.cli.bench_latency import latency
from mili.cli.bench_serve import serve
from mili.cli.bench_startup import startup
from mili.cli.bench_throughput import throughput


class _WithDefault(click.Group):
    """A group whose command `latency` is meant when none is named."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Name the command if the first word is an option of it, or there is none."""
        if not args or (args[0].startswith("-") and args[0] not in ctx.help_option_names):
            args = [latency.name or "", *args]
        return super().parse_args(ctx, args)


@click.group(cls=_WithDefault)
def bench() -> None:
    """Measure speed, beside what the device could do at best.

    Without a command, and with options only, this is `mili bench latency`. The last line is JSON; times in seconds,
    rates per second, except for those of serve, which are vLLM's.
    """


for _command in (latency, throughput, startup, serve):
    bench.add_command(_command)
