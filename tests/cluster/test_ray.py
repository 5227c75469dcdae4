"""`mili.ray` on a Ray cluster of two nodes on this machine: two replicas of the bundled model, one on each node."""

import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

ray = pytest.importorskip("ray", reason="needs mili[ray]")
serve = pytest.importorskip("ray.serve", reason="needs mili[ray]")

from openai import APIStatusError, BadRequestError, OpenAI  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402
from ray.serve.schema import ApplicationStatus  # noqa: E402

from mili import LLM, SamplingParams  # noqa: E402
from mili.ray import Generator, build_app  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own, of this process's thirty threads and sockets

KEY = "key-of-the-test"
OPTIONS = {"device": "cpu", "kv_cache_memory_bytes": 32 << 20}
PROMPTS = [f"def {name}(values: list[float]) -> float:\n" for name in ("add", "minimum", "median")]
LONG = (
    "# Functions on lists of numbers, with their types, their documentation and their tests, one after the other.\n"
    * 12
)


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Where the application listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    node = {"num_cpus": 3, "object_store_memory": 80 << 20}  # cores are counted, not taken: one replica fits on a node
    cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    try:
        cluster.add_node(**node)
        ray.init(address=cluster.address, log_to_driver=False, logging_level="warning")
        serve.start(http_options={"host": "127.0.0.1", "port": port})
        app = build_app(
            num_replicas=2,
            num_cpus=2,
            api_keys=(KEY,),
            max_body_bytes=100_000,
            health_check_period=1,
            drain_timeout=30,
            **OPTIONS,
        )
        serve.run(app, name="mili")
        yield f"http://127.0.0.1:{port}"
    finally:
        serve.shutdown()
        ray.shutdown()
        cluster.shutdown()


@pytest.fixture(scope="module")
def client(address: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60) as client:
        yield client


@pytest.fixture(scope="module")
def http(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=60, headers={"Authorization": f"Bearer {KEY}"}) as http:
        yield http


@pytest.fixture(scope="module")
def model(client: OpenAI) -> str:
    return client.models.list().data[0].id


def replicas() -> list[dict[str, str]]:
    """The names of the replicas' actors."""
    return [actor for actor in ray.util.list_named_actors(all_namespaces=True) if "mili#Replica" in actor["name"]]


def metric(http: httpx.Client, name: str) -> dict[str, float]:
    """The sum of a metric's series for each replica."""
    values: dict[str, float] = {}
    for line in http.get("/metrics").raise_for_status().text.splitlines():
        if line.startswith((f"{name}{{", f"{name} ")):
            replica = line.partition('replica="')[2].partition('"')[0]
            values[replica] = values.get(replica, 0.0) + float(line.rpartition(" ")[2])
    return values


def wait_until(condition, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s"
        time.sleep(0.1)


def test_the_replicas_are_on_two_nodes(address):
    assert len([node for node in ray.nodes() if node["Alive"]]) == 2
    assert len(replicas()) == 2
    assert ray.available_resources()["CPU"] == 6 - 2 * 2 - 1  # so neither node has room for both


def test_answers_are_those_of_the_engine(client, model, bundled_bf16: LLM):
    expected = bundled_bf16.generate(PROMPTS, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    for prompt, output in zip(PROMPTS, expected, strict=True):
        completion = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=12)
        assert completion.choices[0].text == output.text
        assert completion.choices[0].finish_reason == output.outputs[0].finish_reason
        assert completion.usage.prompt_tokens == len(output.prompt_token_ids)
    messages = [{"role": "user", "content": "import "}]
    (output,) = bundled_bf16.chat(messages, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)
    chat = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=12)
    assert chat.choices[0].message.content == output.text
    assert chat.usage.prompt_tokens == len(output.prompt_token_ids)


def test_streams_come_in_pieces_and_say_the_same(client, http, model):
    options = {"model": model, "prompt": PROMPTS[0], "temperature": 0, "max_tokens": 40}
    whole = client.completions.create(**options)
    pieces = [chunk.choices[0].text for chunk in client.completions.create(**options, stream=True)]
    assert "".join(pieces) == whole.choices[0].text
    assert len(pieces) > 1
    with http.stream("POST", "/v1/completions", json={**options, "stream": True}) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers.get_list("x-request-id", split_commas=True).__len__() == 1
        assert response.read().endswith(b"data: [DONE]\n\n")


def test_errors_have_the_envelope_of_mili_serve(client, http, model, address):
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=model, prompt="x", extra_body={"no_such_field": 1})
    assert caught.value.param == "no_such_field"
    too_long = "x " * http.get("/server_info").json()["max_model_len"]
    with pytest.raises(BadRequestError) as caught:
        client.completions.create(model=model, prompt=too_long, max_tokens=4)
    assert caught.value.code == "context_length_exceeded"
    for response, status in (
        (http.get("/nowhere"), 404),
        (http.delete("/v1/completions"), 405),
        (http.post("/metrics"), 405),
        (http.post("/v1/completions", content=b"{"), 415),
        (http.post("/v1/completions", content=b"{", headers={"Content-Type": "application/json"}), 400),
        (http.post("/v1/completions", json={"model": model, "prompt": "x" * 100_001}), 413),
        (httpx.get(f"{address}/v1/models"), 401),
    ):
        assert response.status_code == status
        assert response.json()["error"].keys() == {"message", "type", "param", "code"}


@pytest.mark.parametrize("path", ["health", "ready", "metrics"])
def test_probes_need_no_key(address, path):
    assert httpx.get(f"{address}/{path}").status_code == 200


def test_equal_beginnings_go_to_the_replica_that_has_them(client, http, model):
    def cached(prompt: str) -> int:
        completion = client.completions.create(model=model, prompt=prompt, temperature=0, max_tokens=1)
        return completion.usage.prompt_tokens_details.cached_tokens

    before = metric(http, "mili:prompt_tokens_total")
    beginnings = [f"{family}{LONG}" for family in range(8)]
    assert [cached(beginning) for beginning in beginnings] == [0] * 8
    after = metric(http, "mili:prompt_tokens_total")
    assert all(after[replica] > before[replica] for replica in before)  # new beginnings are spread over both
    for turn in range(3):
        assert all(cached(f"{beginning}{turn}") >= 16 for beginning in beginnings)  # by chance: 1 in 2^24


def test_metrics_count_every_request_of_every_replica(client, http, model):
    before = metric(http, "mili:request_success_total")
    for i in range(6):
        client.completions.create(model=model, prompt=f"{i}{LONG}", max_tokens=2)
    after = metric(http, "mili:request_success_total")
    assert len(after) == 2
    assert sum(after.values()) - sum(before.values()) == 6


def test_a_client_that_leaves_frees_its_pages(http, model):
    body = {"model": model, "prompt": PROMPTS[1], "max_tokens": 400, "ignore_eos": True, "stream": True}
    aborted = sum(metric(http, "mili:request_aborted_total").values())
    with http.stream("POST", "/v1/completions", json=body) as response:
        next(response.iter_lines())
    wait_until(lambda: sum(metric(http, "mili:num_requests_running").values()) == 0, 5)
    assert sum(metric(http, "mili:request_aborted_total").values()) == aborted + 1


class Stream(threading.Thread):
    """Reads a long stream to its end."""

    def __init__(self, http: httpx.Client, model: str, prompt: str, num_tokens: int) -> None:
        super().__init__()
        self._http = http
        self._body = {"model": model, "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True, "stream": True}
        self.begun = threading.Event()
        self.lines: list[str] = []
        self.start()

    def run(self) -> None:
        with self._http.stream("POST", "/v1/completions", json=self._body) as response:
            for line in response.iter_lines():
                if line:
                    self.lines.append(line)
                    self.begun.set()


def test_a_lost_replica_fails_its_requests_cleanly_and_is_replaced(client, http, model):
    streams = [Stream(http, model, prompt, 1000) for prompt in ("a = ", "b = ")]  # new and at once: one on each replica
    assert all(stream.begun.wait(30) for stream in streams)
    ray.kill(ray.get_actor(**replicas()[0]), no_restart=True)
    for stream in streams:
        stream.join(120)
    lost, served = sorted(streams, key=lambda stream: stream.lines[-1] == "data: [DONE]")
    assert served.lines[-1] == "data: [DONE]"
    error = json.loads(lost.lines[-1].removeprefix("data: "))["error"]
    assert error["code"] == "replica_lost"
    assert error.keys() == {"message", "type", "param", "code"}

    for i in range(4):  # the other goes on
        assert client.completions.create(model=model, prompt=f"c{i} = ", max_tokens=2).usage.completion_tokens == 2

    wait_until(lambda: is_whole(http), 90)


def is_whole(http: httpx.Client) -> bool:
    """Whether both replicas are there and the ingress knows it."""
    application = serve.status().applications["mili"]
    return application.status == ApplicationStatus.RUNNING and len(metric(http, "mili:engine_ready")) == 2


def test_a_replica_whose_engine_has_died_is_replaced(http):
    before = {name["name"] for name in replicas()}
    victim = ray.get_actor(**replicas()[0])

    def kill_engine(actor) -> None:
        actor._replica_impl._user_callable_wrapper._callable._llm.close()

    ray.get(victim.__ray_call__.remote(kill_engine))
    wait_until(lambda: len({name["name"] for name in replicas()} & before) == 1 and is_whole(http), 90)


def test_a_request_to_no_replica_is_refused_cleanly(client, model):
    """Both die: the one request that meets this fails as an API error, and the next ones wait for the new replicas."""
    for name in replicas():
        ray.kill(ray.get_actor(**name), no_restart=True)
    try:
        completion = client.completions.create(model=model, prompt="d = ", max_tokens=2)
        assert completion.usage.completion_tokens == 2
    except APIStatusError as error:
        assert error.status_code == 503
        assert error.code == "replica_lost"
    client.completions.create(model=model, prompt="e = ", max_tokens=2)


def test_a_request_in_flight_is_finished_before_the_application_goes(http, model):
    wait_until(lambda: is_whole(http), 90)
    stream = Stream(http, model, "f = ", 200)
    assert stream.begun.wait(30)
    serve.delete("mili")
    stream.join(120)
    assert stream.lines[-1] == "data: [DONE]"
    assert replicas() == []


def test_ray_data_completes_every_row_as_the_engine_does(address, bundled_bf16: LLM):
    if "mili" in serve.status().applications:
        serve.delete("mili")  # its cores are for the actors now
    params = SamplingParams(temperature=0, max_tokens=12)
    rows = [{"index": i, "prompt": PROMPTS[i % 3] * (1 + i // 3)} for i in range(10)]
    constructor = {"sampling_params": params, **OPTIONS}
    dataset = ray.data.from_items(rows).map_batches(
        Generator, fn_constructor_kwargs=constructor, batch_size=3, concurrency=2, num_cpus=1
    )
    completed = sorted(dataset.take_all(), key=lambda row: row["index"])
    expected = bundled_bf16.generate([row["prompt"] for row in rows], params, use_tqdm=False)
    assert [row["generated_text"] for row in completed] == [output.text for output in expected]
    assert [row["num_prompt_tokens"] for row in completed] == [len(output.prompt_token_ids) for output in expected]
    assert [row["finish_reason"] for row in completed] == [output.outputs[0].finish_reason for output in expected]
