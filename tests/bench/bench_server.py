"""What the server costs: its throughput as a share of the engine's own, streaming and not.

    PYTHONPATH=src:tests python tests/bench/bench_server.py [--rounds 5] [--concurrent 32]

The same prompts and lengths go through `LLM.generate` in this process and through `mili serve` in another, in turn, so
that a machine that changes its speed changes both; the one that is not measured is idle. The client runs on the same
machine, so its share is in the server's figure; `mili bench serve` prints how much of a core it took. The bundled
model; the last line is JSON.
"""

import argparse
import asyncio
import json
import random
import statistics
import subprocess
import sys
import time

import aiohttp

from mili import LLM, SamplingParams
from support.live import serve

NUM_REQUESTS, PROMPT_LEN, LENGTHS = 300, 64, (32, 96)
_SETTLE = 8.0  # seconds; the workers of MAX look for more to do for up to 6 s, on every core


def engine_speed(llm: LLM, prompts: list[list[int]], lengths: list[int]) -> float:
    params = [SamplingParams(temperature=0.0, max_tokens=length, ignore_eos=True) for length in lengths]
    started = time.perf_counter()
    llm.generate(prompts, params, use_tqdm=False)
    return sum(lengths) / (time.perf_counter() - started)


async def plain_speed(url: str, prompts: list[list[int]], lengths: list[int], concurrent: int) -> float:
    pairs = iter(zip(prompts, lengths, strict=True))
    async with aiohttp.ClientSession() as session:

        async def visitor() -> None:
            for prompt, length in pairs:
                body = {"prompt": prompt, "max_tokens": length, "temperature": 0, "ignore_eos": True}
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    assert (await answer.json())["usage"]["completion_tokens"] == length

        started = time.perf_counter()
        await asyncio.gather(*(visitor() for _ in range(concurrent)))
        return sum(lengths) / (time.perf_counter() - started)


def stream_speed(url: str, concurrent: int) -> float:
    command = [sys.executable, "-m", "mili", "bench", "serve", "--base-url", url, "--json"]
    command += ["--num-requests", str(NUM_REQUESTS), "--concurrent", str(concurrent)]
    command += ["--prompt-len", str(PROMPT_LEN), "--output-len", f"{LENGTHS[0]}:{LENGTHS[1]}"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout.splitlines()[-1])["output_throughput"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--concurrent", type=int, default=32)
    options = parser.parse_args()
    rng = random.Random(0)
    prompts = [[rng.randrange(256) for _ in range(PROMPT_LEN)] for _ in range(NUM_REQUESTS)]
    lengths = [rng.randint(*LENGTHS) for _ in range(NUM_REQUESTS)]
    engine = {"max_num_seqs": options.concurrent, "enable_prefix_caching": False}
    speeds: dict[str, list[float]] = {"engine": [], "plain": [], "stream": []}
    args = ("--max-num-seqs", str(options.concurrent), "--no-enable-prefix-caching", "--no-access-log")
    with serve(*args) as server, LLM(**engine) as llm:
        engine_speed(llm, prompts[: options.concurrent], lengths[: options.concurrent])
        for _ in range(options.rounds):
            time.sleep(_SETTLE)
            speeds["engine"].append(engine_speed(llm, prompts, lengths))
            time.sleep(_SETTLE)
            speeds["plain"].append(asyncio.run(plain_speed(server.url, prompts, lengths, options.concurrent)))
            speeds["stream"].append(stream_speed(server.url, options.concurrent))
            print(*(f"{name} {values[-1]:7.0f} tok/s" for name, values in speeds.items()), sep="   ")
    for name in ("plain", "stream"):
        shares = [a / b for a, b in zip(speeds[name], speeds["engine"], strict=True)]
        print(f"{name}: {statistics.median(shares):.2f} of the engine ({min(shares):.2f} to {max(shares):.2f})")
    print(json.dumps({name: [round(value, 1) for value in values] for name, values in speeds.items()}))


if __name__ == "__main__":
    main()
