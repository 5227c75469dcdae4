"""What the server costs: its throughput as a share of the engine's own, streaming and not.

    PYTHONPATH=src:tests python tests/bench/bench_server.py [--rounds 5] [--concurrent 32] [--new 32:96]

The same prompts and lengths go all ways in turn, so that a machine that changes its speed changes all of them; nobody
else runs meanwhile:

    all at once     `LLM.generate` in this process: a place that is free is taken in the next step
    engine          `AsyncLLM` in this process, whose readers ask for the next answer when they have the last: so many
                    requests at once, as the server's clients make them, and no server
    plain, stream   `mili serve` in another process

The client runs on the same machine, so what it takes is in the server's figure: it reads bytes and looks into them
afterwards. The bundled model; the last line is JSON.
"""

import argparse
import asyncio
import json
import os
import random
import re
import statistics
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import uvloop

from mili import LLM, AsyncLLM, SamplingParams
from support.live import serve

NUM_REQUESTS, PROMPT_LEN = 300, 64


def settle(*pids: int) -> None:
    """Wait until the processes rest: on every core MAX's workers look for work about as long as they worked."""

    def used() -> float:
        stats = [Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rsplit(")", 1)[1].split() for pid in pids]
        return sum(int(stat[11]) + int(stat[12]) for stat in stats) / os.sysconf("SC_CLK_TCK")

    before = -1.0
    while used() - before > 0.05:
        before = used()
        time.sleep(1)


def all_at_once_speed(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> float:
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return sum(lengths) / (time.perf_counter() - started)


async def engine_speed(llm: AsyncLLM, prompts: list[list[int]], lengths: list[int], concurrent: int) -> float:
    waiting = iter(zip(prompts, lengths, strict=True))

    async def visitor() -> None:
        for prompt, length in waiting:
            await llm.complete(prompt, SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True))

    started = time.perf_counter()
    await asyncio.gather(*(visitor() for _ in range(concurrent)))
    return sum(lengths) / (time.perf_counter() - started)


class Visitor(asyncio.Protocol):
    """One connection, which sends the next request when the answer to its last one is complete.

    It keeps what it reads and looks into it when the clock has stopped: on the server's cores, each microsecond of a
    client's work for an event would be counted as the server's.
    """

    def __init__(self, requests: Iterator[bytes], end: bytes) -> None:
        self.answers: list[bytes] = []
        self.done = asyncio.get_running_loop().create_future()
        self._requests, self._end, self._received = requests, end, bytearray()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = transport
        self._visit()

    def data_received(self, data: bytes) -> None:
        self._received += data
        if data.endswith(self._end):
            self.answers.append(bytes(self._received))
            self._received.clear()
            self._visit()

    def connection_lost(self, error: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(error or ConnectionError("the server closed the connection"))

    def _visit(self) -> None:
        if request := next(self._requests, None):
            self._transport.write(request)
        else:
            self.done.set_result(None)
            self._transport.close()


@contextmanager
def guest() -> Iterator[None]:
    """Let this thread interrupt no other when it wakes, as a client elsewhere could not.

    Each event wakes the client, and Linux would run it in place of the server's loop, which holds Python's lock.
    """
    os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))
    try:
        yield
    finally:
        os.sched_setscheduler(0, os.SCHED_OTHER, os.sched_param(0))


async def server_speed(url: str, prompts: list[list[int]], lengths: list[int], concurrent: int, stream: bool) -> float:
    address = url.removeprefix("http://")
    head = f"POST /v1/completions HTTP/1.1\r\nhost: {address}\r\ncontent-type: application/json\r\ncontent-length: "
    requests = []
    for prompt, length in zip(prompts, lengths, strict=True):
        fields = {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        body = json.dumps(fields)
        requests.append(f"{head}{len(body)}\r\n\r\n{body}".encode())
    waiting = iter(requests)
    end = b"data: [DONE]\n\n\r\n0\r\n\r\n" if stream else b"}}"
    visitors = [Visitor(waiting, end) for _ in range(concurrent)]
    host, port = address.split(":")
    started = time.perf_counter()
    for visitor in visitors:
        await asyncio.get_running_loop().create_connection(lambda visitor=visitor: visitor, host, int(port))
    await asyncio.gather(*(visitor.done for visitor in visitors))
    seconds = time.perf_counter() - started
    answers = b"".join(answer for visitor in visitors for answer in visitor.answers)
    told = [int(number) for number in re.findall(rb'"completion_tokens":(\d+)', answers)]
    assert sorted(told) == sorted(lengths), "an answer is missing or short"
    return sum(lengths) / seconds


def span(text: str) -> tuple[int, int]:
    """`32:96` as (32, 96)."""
    low, high = map(int, text.split(":"))
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=32)
    parser.add_argument("--new", type=span, default=(32, 96), metavar="LOW:HIGH", help="tokens of an answer")
    options = parser.parse_args()
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(PROMPT_LEN)] for _ in range(NUM_REQUESTS)]
    lengths = [rng.randint(*options.new) for _ in range(NUM_REQUESTS)]
    engine = {"max_num_seqs": options.concurrent, "enable_prefix_caching": False}
    speeds: dict[str, list[float]] = {"all at once": [], "engine": [], "plain": [], "stream": []}
    args = ("--max-num-seqs", str(options.concurrent), "--no-enable-prefix-caching", "--no-access-log")
    with serve(*args) as server, LLM(**engine) as llm, closing(AsyncLLM(**engine)) as async_llm:
        all_at_once_speed(llm, prompts[: options.concurrent], lengths[: options.concurrent])
        for _ in range(options.rounds):
            settle(os.getpid(), server.process.pid)
            speeds["all at once"].append(all_at_once_speed(llm, prompts, lengths))
            settle(os.getpid(), server.process.pid)
            speeds["engine"].append(uvloop.run(engine_speed(async_llm, prompts, lengths, options.concurrent)))
            settle(os.getpid(), server.process.pid)
            for name in ("plain", "stream"):
                load = server_speed(server.url, prompts, lengths, options.concurrent, name == "stream")
                with guest():
                    speeds[name].append(uvloop.run(load))
            print(*(f"{name} {values[-1]:7.0f} tok/s" for name, values in speeds.items()), sep="   ")
    for name in ("plain", "stream"):
        shares = [a / b for a, b in zip(speeds[name], speeds["engine"], strict=True)]
        print(f"{name}: {statistics.median(shares):.2f} of the engine ({min(shares):.2f} to {max(shares):.2f})")
    print(json.dumps({name: [round(value, 1) for value in values] for name, values in speeds.items()}))


if __name__ == "__main__":
    main()
