"""A crowd of clients for one server on this machine: mixed lengths, some leave early, some ask for nonsense.

Everything is drawn from a seed, so a failure can be run again. Every request ends as exactly one `Outcome`; anything
that is none of the expected ones raises.
"""

import asyncio
import json
import random
from collections import Counter
from dataclasses import dataclass, field

import httpx

WORDS = ("def", "return", "import", "class", "self", "print", "range", "for", "if", "else", "while", "try", "value")
INVALID = (
    {"prompt": "x", "max_tokens": -1},
    {"prompt": "x", "temperatur": 0.5},
    {"prompt": "x", "best_of": 3},
    {"prompt": [9_999_999]},
    {"prompt": ""},
    {"prompt": "x " * 3000},
    {"prompt": "x", "model": "another"},
)


@dataclass
class Tally:
    """What a crowd saw."""

    outcomes: Counter[str] = field(default_factory=Counter)  # finished, cancelled, refused
    finish_reasons: Counter[str] = field(default_factory=Counter)  # of the finished
    prompt_tokens: int = 0  # of the finished
    completion_tokens: int = 0  # of the finished


@dataclass(frozen=True)
class Plan:
    """One request of the crowd."""

    path: str
    body: dict
    leaves_after: float | None  # seconds until the client goes away
    refused: bool

    @classmethod
    def draw(cls, rng: random.Random, *, leavers: float, invalid: float) -> "Plan":
        """A request; `leavers` and `invalid` are shares."""
        if rng.random() < invalid:
            return cls("/v1/completions", {"max_tokens": 4, **rng.choice(INVALID)}, None, True)
        prompt = " ".join(rng.choices(WORDS, k=rng.choice((2, 10, 60, 200))))
        body = {
            "max_tokens": rng.choice((1, 4, 16, 48)),
            "temperature": rng.choice((0.0, 0.8)),
            "seed": rng.randrange(1000),
            "stream": rng.random() < 0.5,
        }
        if body["stream"]:
            body["stream_options"] = {"include_usage": True}
        if rng.random() < 0.1:
            body |= {"temperature": 1.0, "n": 2}
        if rng.random() < 0.2:
            body["stop"] = ["\n\n", "return"]
        leaves_after = rng.expovariate(1 / 0.15) if rng.random() < leavers else None
        if rng.random() < 0.5:
            return cls("/v1/completions", {**body, "prompt": prompt}, leaves_after, False)
        return cls(
            "/v1/chat/completions", {**body, "messages": [{"role": "user", "content": prompt}]}, leaves_after, False
        )


async def crowd(
    base_url: str, num_requests: int, concurrency: int, seed: int, *, leavers: float = 0.0, invalid: float = 0.0
) -> Tally:
    """Send the requests, `concurrency` at a time, and return what became of them."""
    rng = random.Random(seed)
    plans = [Plan.draw(rng, leavers=leavers, invalid=invalid) for _ in range(num_requests)]
    tally = Tally()
    remaining = iter(plans)
    limits = httpx.Limits(max_connections=concurrency, max_keepalive_connections=concurrency)
    async with httpx.AsyncClient(base_url=base_url, timeout=120, limits=limits) as client:

        async def visitor() -> None:
            for plan in remaining:
                try:
                    async with asyncio.timeout(plan.leaves_after):
                        await _send(client, plan, tally)
                except TimeoutError:
                    assert plan.leaves_after is not None
                    tally.outcomes["cancelled"] += 1

        async with asyncio.TaskGroup() as group:
            for _ in range(concurrency):
                group.create_task(visitor())
    assert sum(tally.outcomes.values()) == num_requests
    return tally


async def _send(client: httpx.AsyncClient, plan: Plan, tally: Tally) -> None:
    if plan.refused:
        response = await client.post(plan.path, json=plan.body)
        assert response.status_code in (400, 404), (response.status_code, response.text, plan)
        assert response.json()["error"]["message"]
        tally.outcomes["refused"] += 1
        return
    if plan.body["stream"]:
        reasons, usage = await _read_stream(client, plan)
    else:
        response = await client.post(plan.path, json=plan.body)
        assert response.status_code == 200, (response.status_code, response.text, plan)
        answer = response.json()
        reasons, usage = [choice["finish_reason"] for choice in answer["choices"]], answer["usage"]
    assert len(reasons) == plan.body.get("n", 1), "one finish reason for each choice"
    assert all(reason in ("stop", "length") for reason in reasons), reasons
    assert 1 <= usage["completion_tokens"] <= plan.body["max_tokens"] * len(reasons)
    tally.outcomes["finished"] += 1
    tally.finish_reasons["length" if "length" in reasons else "stop"] += 1
    tally.prompt_tokens += usage["prompt_tokens"]
    tally.completion_tokens += usage["completion_tokens"]


async def _read_stream(client: httpx.AsyncClient, plan: Plan) -> tuple[list[str], dict]:
    reasons, usage, done = [], None, False
    async with client.stream("POST", plan.path, json=plan.body) as response:
        assert response.status_code == 200, (response.status_code, await response.aread(), plan)
        async for line in response.aiter_lines():
            if not line:
                continue
            assert not done, "nothing follows [DONE]"
            assert line.startswith("data: ")
            if line == "data: [DONE]":
                done = True
                continue
            chunk = json.loads(line.removeprefix("data: "))
            assert "error" not in chunk, chunk
            reasons += [choice["finish_reason"] for choice in chunk["choices"] if choice["finish_reason"]]
            usage = chunk.get("usage") or usage
    assert done and usage is not None
    return reasons, usage
