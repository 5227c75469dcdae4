"""The parts of `mili.ray` that need no cluster: what is remembered, how an application is run, options, metrics."""

import asyncio
import json
from types import SimpleNamespace

import numpy as np
import pytest

pytest.importorskip("ray.serve", reason="needs mili[ray]")
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::ResourceWarning")

from pydantic import ValidationError  # noqa: E402
from ray.serve._private.common import DeploymentHandleSource  # noqa: E402

from mili import SamplingParams  # noqa: E402
from mili.errors import ConfigError, RequestError  # noqa: E402
from mili.ray import Generator  # noqa: E402
from mili.ray.application import Arguments, build, build_app  # noqa: E402
from mili.ray.asgi import HttpRequest, respond  # noqa: E402
from mili.ray.metrics import merge  # noqa: E402
from mili.ray.prefix import BLOCK_CHARS, MAX_BLOCKS, PrefixIndex, prefix_blocks  # noqa: E402
from mili.ray.router import PrefixRouter  # noqa: E402

SCOPE = {"method": "POST", "path": "/", "query_string": b"", "headers": [], "http_version": "1.1", "scheme": "http"}


def body(**fields: object) -> bytes:
    return json.dumps(fields).encode()


def test_equal_beginnings_have_equal_blocks():
    first, second = "x" * (5 * BLOCK_CHARS), "x" * (3 * BLOCK_CHARS) + "y" * BLOCK_CHARS
    blocks, others = prefix_blocks(body(prompt=first)), prefix_blocks(body(prompt=second))
    assert (len(blocks), len(others)) == (5, 4)
    assert blocks[:3] == others[:3]
    assert len(set(blocks)) == 5  # a block's hash says what is before it, not only what is in it


def test_a_conversation_that_goes_on_keeps_its_blocks():
    messages = [{"role": "system", "content": "s" * 200}, {"role": "user", "content": "u" * 200}]
    blocks = prefix_blocks(body(messages=messages))
    longer = prefix_blocks(body(messages=[*messages, {"role": "assistant", "content": "a" * 200}]))
    assert len(blocks) >= 6
    assert longer[: len(blocks) - 1] == blocks[:-1]  # the last block has the list's end in it
    with_tools = prefix_blocks(body(messages=messages, tools=[{"type": "function"}]))
    assert with_tools[0] != blocks[0]


@pytest.mark.parametrize("data", [b"", b"\xff", b"[1]", b"{}", b"[" * 100_000, body(prompt="short"), body(prompt=None)])
def test_a_body_without_a_whole_block_has_none(data):
    assert prefix_blocks(data) == ()


def test_lone_surrogates_and_endless_prompts_are_hashed_within_bounds():
    assert len(prefix_blocks(b'{"prompt": "' + b"\\ud800" * BLOCK_CHARS + b'"}')) == 1
    assert len(prefix_blocks(body(prompt="z" * (BLOCK_CHARS * (MAX_BLOCKS + 5))))) == MAX_BLOCKS
    assert len(prefix_blocks(body(prompt=list(range(1000))))) > 10


def test_the_index_matches_beginnings_and_forgets_the_oldest_ends():
    blocks = [bytes([i]) for i in range(6)]
    index = PrefixIndex(capacity=6)
    index.record("a", blocks)
    assert index.match("a", blocks) == 6
    assert index.match("a", [*blocks[:2], b"other", *blocks[3:]]) == 2
    assert index.match("b", blocks) == 0
    index.record("a", [b"x", b"y"])
    assert index.size("a") == 6
    assert index.match("a", blocks) == 4
    index.retain({"b"})
    assert index.size("a") == index.match("a", blocks) == 0


class FakeReplica:
    max_ongoing_requests = 100

    def __init__(self, name: str) -> None:
        self.replica_id = name


def ranks(queued: dict[str, int], prompt: str) -> list[list[str]]:
    """The router's ranks when replica "a" has served "p"*640 and "b" has served "q"*64."""
    router = PrefixRouter(SimpleNamespace(name="Replica", app_name="mili"), DeploymentHandleSource.REPLICA)
    router.initialize_state(max_imbalance=4, capacity=100)
    for replica, served in (("a", "p" * 640), ("b", "q" * 64)):
        router.on_request_routed(pending(served), replica, None)
    for replica, num_requests in queued.items():
        router.replica_queue_len_cache.update(replica, num_requests)
    chosen = asyncio.run(router.choose_replicas([FakeReplica(name) for name in "abc"], pending(prompt)))
    return [[replica.replica_id for replica in rank] for rank in chosen]


def pending(prompt: str) -> SimpleNamespace:
    return SimpleNamespace(args=[HttpRequest(SCOPE, b"", prefix_blocks(body(prompt=prompt)))])


@pytest.mark.parametrize(
    ("queued", "prompt", "expected"),
    [
        ({}, "p" * 640, [["a"], ["c", "b"]]),
        ({"a": 4}, "p" * 640, [["a"], ["c", "b"]]),  # a little busier is worth it
        ({"a": 5}, "p" * 640, [["c", "b"], ["a"]]),  # much busier is not; still offered, should the others be full
        ({"a": 9, "b": 6, "c": 5}, "p" * 640, [["a"], ["c", "b"]]),  # busier than the least busy, that is
        ({}, "q" * 64 + "p" * 640, [["b"], ["c", "a"]]),
        ({}, "z" * 640, [["c", "b", "a"]]),  # nobody has it: those who remember least first
    ],
)
def test_the_router_ranks_replicas_by_prefix_while_load_is_even(queued, prompt, expected):
    assert ranks(queued, prompt) == expected


def test_requests_without_a_prompt_go_anywhere():
    assert len({tuple(ranks({}, "")[0]) for _ in range(60)}) == 6  # every order of three


async def collect(app, request: HttpRequest) -> list:
    return [message async for messages in respond(app, request) for message in messages]


def test_an_application_gets_the_request_and_its_messages_come_back():
    async def app(scope, receive, send):
        message = await receive()
        await send({"type": "http.response.start", "status": 200, "headers": []})
        for _ in range(200):  # more than may be ahead
            await send({"type": "http.response.body", "body": message["body"], "more_body": True})
        await send({"type": "http.response.body", "body": scope["path"].encode()})

    request = HttpRequest.from_scope({**SCOPE, "app": object()}, b"b", ())
    assert "app" not in request.scope  # such things cannot be sent
    messages = asyncio.run(collect(app, request))
    assert b"".join(message["body"] for message in messages[1:]) == b"b" * 200 + b"/"


def test_a_failure_before_the_end_is_raised_and_one_after_it_is_not():
    def failing(complete: bool):
        async def app(scope, receive, send):
            await send({"type": "http.response.start", "status": 200, "headers": []})
            await send({"type": "http.response.body", "body": b"", "more_body": not complete})
            raise ZeroDivisionError

        return app

    assert len(asyncio.run(collect(failing(True), HttpRequest(SCOPE, b"")))) == 2
    with pytest.raises(ZeroDivisionError):
        asyncio.run(collect(failing(False), HttpRequest(SCOPE, b"")))


@pytest.mark.parametrize("listens", [True, False])
def test_leaving_early_disconnects_the_application_and_ends_its_task(listens):
    ends: list[str] = []

    async def app(scope, receive, send):
        try:
            await receive()
            await send({"type": "http.response.start", "status": 200, "headers": []})
            if listens:
                assert (await receive())["type"] == "http.disconnect"
                ends.append("disconnected")
            else:
                while True:
                    await send({"type": "http.response.body", "body": b"x", "more_body": True})
        except asyncio.CancelledError:
            ends.append("cancelled")
            raise

    async def leave() -> int:
        answer = respond(app, HttpRequest(SCOPE, b""))
        await anext(answer)
        await answer.aclose()
        return len(asyncio.all_tasks())

    assert asyncio.run(leave()) == 1
    assert ends == ["disconnected" if listens else "cancelled"]


def test_metrics_of_replicas_are_merged_under_one_heading():
    text = (
        "# HELP m:a_total A.\n# TYPE m:a_total counter\n"
        'm:a_total{model_name="q"} %d.0\n# HELP m:g G.\n# TYPE m:g gauge\nm:g 1.0\n'
    )
    lines = merge({"r1": text % 3, "r2": text % 4}).decode().splitlines()
    assert lines.count("# TYPE m:a_total counter") == lines.count("# TYPE m:g gauge") == 1
    assert 'm:a_total{model_name="q",replica="r1"} 3.0' in lines
    assert 'm:a_total{model_name="q",replica="r2"} 4.0' in lines
    assert len(lines) == 8


def test_arguments_come_as_text_from_the_command_line():
    arguments = Arguments.model_validate({"num_replicas": "2", "max_num_seqs": "8", "num_gpus": "0.5", "model": "a/b"})
    assert (arguments.num_replicas, arguments.max_num_seqs, arguments.num_gpus) == (2, 8, 0.5)
    assert arguments.block_size == 16
    assert arguments.max_queue == 256


@pytest.mark.parametrize("options", [{"port": 1}, {"num_replicas": 0}, {"max_num_seqs": "many"}, {"hots": "x"}])
def test_an_option_that_would_do_nothing_or_is_wrong_is_refused(options):
    with pytest.raises(ValidationError, match=next(iter(options))):
        build_app(**options)


def test_options_are_checked_before_anything_is_deployed():
    with pytest.raises(ConfigError, match="page_size"):
        build_app(block_size=17)
    with pytest.raises(ConfigError, match="max_queue"):
        build_app(max_queue=-1)
    with pytest.raises(ConfigError, match="num_gpus is 0"):
        build(Arguments(device="gpu"))


def test_the_generator_keeps_columns_and_takes_text_or_token_ids(bundled_bf16):
    params = SamplingParams(temperature=0, max_tokens=4)
    generator = Generator(None, params, "p", "text", device="cpu", kv_cache_memory_bytes=32 << 20)
    token_ids = bundled_bf16.get_tokenizer().encode("import ")
    ids = np.empty(2, dtype=object)  # as Ray hands over a column of lists
    ids[:] = [np.array(token_ids), np.array(token_ids[:1])]
    as_text = generator({"p": np.array(["import ", "x = "], dtype=object), "kept": np.array([1, 2])})
    assert as_text["kept"].tolist() == [1, 2]
    assert as_text["num_generated_tokens"].tolist() == [4, 4]
    assert generator({"p": ids})["text"][0] == as_text["text"][0]
    with pytest.raises(RequestError):
        generator({"p": np.array([""], dtype=object)})
