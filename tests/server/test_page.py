"""The web page in headless Chromium: against a stub in which the test plays the model."""

import re
import shutil
import time
from collections.abc import Callable, Iterator

import pytest

from mili.async_llm import AsyncLLM
from mili.server.app import create_app
from mili.server.config import ServerConfig
from mili.server.page import load_page

sync_api = pytest.importorskip("playwright.sync_api", reason="needs playwright, which the dev extra installs")
CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    pytest.skip("needs a chromium on the PATH (Debian: apt-get install chromium)", allow_module_level=True)

from playwright.sync_api import Browser, Locator, Page, expect  # noqa: E402

from support.stub_api import Stream, StubApi, chunk, running_stub, serving  # noqa: E402

MARKUP = "<img src=x onerror='window.ran = true'><script>window.ran = true</script>"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    expect.set_options(timeout=15_000)  # the machine may be busy
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def server() -> Iterator[StubApi]:
    with running_stub() as stub:
        yield stub


@pytest.fixture
def stub(server: StubApi) -> StubApi:
    server.models, server.api_key, server.refusal = ["stub"], "", None
    return server


@pytest.fixture
def open_page(browser: Browser) -> Iterator[Callable[[str], Page]]:
    """Opens a URL; afterwards nothing may have been loaded from elsewhere, and nothing complained on the console
    but the network's own line for a refused request.
    """
    context = browser.new_context()
    complaints: list[str] = []
    requested: list[str] = []

    def open_url(url: str) -> Page:
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text) if message.type != "debug" else None)
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("request", lambda request: requested.append(request.url))
        page.goto(url)
        return page

    yield open_url
    pages = [page.url for page in context.pages]
    context.close()
    expected = re.compile(r"Failed to load resource|\[DOM\] Password forms")  # the second is advice, level verbose
    assert [text for text in complaints if not expected.search(text)] == []
    assert requested and pages
    assert [url for url in requested if not url.startswith(("http://127.0.0.1:", "data:"))] == []


@pytest.fixture
def page(open_page: Callable[[str], Page], stub: StubApi) -> Page:
    page = open_page(stub.url)
    expect(field(page, "Model")).to_have_value("stub")
    return page


def field(page: Page, label: str) -> Locator:
    return page.get_by_label(label, exact=True)


def send(page: Page, text: str) -> None:
    field(page, "Prompt").fill(text)
    page.keyboard.press("Enter")


def last(page: Page, part: str) -> Locator:
    return page.locator("article").last.locator(part)


def answered(page: Page, stub: StubApi, prompt: str, answer: str) -> Stream:
    """Send `prompt` and have it answered."""
    send(page, prompt)
    stream = stub.next()
    stream.text(answer)
    stream.end()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(last(page, ".answer")).to_have_text(answer)
    return stream


def test_a_chat_shows_each_piece_when_it_comes(page, stub):
    send(page, "hello")
    stream = stub.next()
    expect(last(page, ".prompt")).to_have_text("hello")
    expect(field(page, "Prompt")).to_have_value("")
    for piece, so_far in (("Good", "Good"), (" morn", "Good morn"), ("ing.", "Good morning.")):
        stream.text(piece)
        expect(last(page, ".answer")).to_have_text(so_far, use_inner_text=True)
        expect(page.get_by_role("button", name="Stop")).to_be_visible()
    stream.end()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    assert stream.path == "/v1/chat/completions"
    assert stream.body == {
        "model": "stub",
        "stream": True,
        "stream_options": {"include_usage": True},
        "messages": [{"role": "user", "content": "hello"}],
        "chat_template_kwargs": {"enable_thinking": True},
    }
    assert "authorization" not in stream.headers


def test_the_next_message_carries_the_chat_and_clear_forgets_it(page, stub):
    answered(page, stub, "one", "first")
    first = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "first"}]
    stream = answered(page, stub, "two", "second")
    assert stream.body["messages"] == [*first, {"role": "user", "content": "two"}]
    page.get_by_role("button", name="Clear").click()
    expect(page.locator("article")).to_have_count(0)
    stream = answered(page, stub, "three", "third")
    assert stream.body["messages"] == [{"role": "user", "content": "three"}]


def test_a_completion_follows_its_prompt(page, stub):
    page.get_by_text("Complete", exact=True).click()
    send(page, "def f():\n")
    stream = stub.next()
    stream.text("    return", " 1")
    expect(last(page, ".exchange")).to_have_text("def f():\n    return 1", use_inner_text=True)
    stream.end(reason="length")
    expect(last(page, ".facts")).to_contain_text("cut off at the length limit")
    expect(field(page, "Prompt")).to_have_value("def f():\n")
    assert stream.path == "/v1/completions"
    assert stream.body == {
        "model": "stub",
        "stream": True,
        "stream_options": {"include_usage": True},
        "prompt": "def f():\n",
    }
    assert page.url.endswith("#complete")
    page.reload()
    expect(page.get_by_role("radio", name="Complete")).to_be_checked()


def test_settings_are_sent_and_empty_ones_are_not(page, stub):
    for label, value in (("Temperature", "0.6"), ("Top p", "0.95"), ("Max tokens", "64"), ("Seed", "7")):
        field(page, label).fill(value)
    field(page, "System prompt").fill("Be short.")
    field(page, "Thinking, if the model can").uncheck()
    body = answered(page, stub, "hello", "hi").body
    assert {name: body[name] for name in ("temperature", "top_p", "max_tokens", "seed")} == {
        "temperature": 0.6,
        "top_p": 0.95,
        "max_tokens": 64,
        "seed": 7,
    }
    assert body["messages"][0] == {"role": "system", "content": "Be short."}
    assert body["chat_template_kwargs"] == {"enable_thinking": False}
    for label in ("Temperature", "Top p", "Max tokens", "Seed", "System prompt"):
        field(page, label).fill("")
    body = answered(page, stub, "again", "hi").body
    assert not body.keys() & {"temperature", "top_p", "max_tokens", "seed", "tools"}
    assert body["messages"][0]["role"] == "user"


def test_a_setting_that_cannot_be_meant_is_not_sent(page, stub):
    field(page, "Tools").fill("[{")
    page.get_by_text("Settings").click()
    expect(field(page, "Tools")).to_be_hidden()
    send(page, "hello")
    expect(field(page, "Tools")).to_be_focused()  # opened again, because it is wrong
    expect(page.locator("article")).to_have_count(0)
    assert stub.streams.empty()
    field(page, "Tools").fill("[]")
    assert answered(page, stub, "hello", "hi").body["tools"] == []


def test_reasoning_is_apart_and_folded_and_sent_back_apart(page, stub):
    send(page, "why?")
    stream = stub.next()
    stream.send(chunk({"reasoning": "Let me "}), chunk({"reasoning": "see."}))
    expect(last(page, ".reasoning summary")).to_have_text("Thinking …")
    expect(last(page, ".reasoning .said")).to_be_hidden()
    stream.text("Because.")
    expect(last(page, ".reasoning summary")).to_have_text("Reasoning")
    stream.end()
    last(page, ".reasoning summary").click()
    expect(last(page, ".reasoning .said")).to_have_text("Let me see.")
    expect(last(page, ".answer")).to_have_text("Because.")
    messages = answered(page, stub, "sure?", "Yes.").body["messages"]
    assert messages[1] == {"role": "assistant", "content": "Because.", "reasoning": "Let me see."}
    expect(last(page, ".reasoning")).to_be_hidden()


def test_tool_calls_are_shown_as_json_and_take_their_results(page, stub):
    tools = '[{"type": "function", "function": {"name": "weather"}}]'
    field(page, "Tools").fill(tools)
    send(page, "weather in Paris and Rome?")
    stream = stub.next()
    assert stream.body["tools"] == [{"type": "function", "function": {"name": "weather"}}]
    for index, city in enumerate(("Paris", "Rome")):
        call = {"index": index, "id": f"c{index}", "type": "function", "function": {"name": "weather", "arguments": ""}}
        stream.send(chunk({"tool_calls": [call]}))
        for piece in ('{"city": ', f'"{city}"}}'):
            stream.send(chunk({"tool_calls": [{"index": index, "function": {"arguments": piece}}]}))
    expect(last(page, ".call").nth(1)).to_have_text('{"name": "weather", "arguments": {"city": "Rome"}}')
    stream.end(reason="tool_calls")
    shown = '{\n  "name": "weather",\n  "arguments": {\n    "city": "Paris"\n  }\n}'
    expect(last(page, ".call").first).to_have_text(shown, use_inner_text=True)
    expect(field(page, "Prompt")).to_have_attribute("placeholder", "Result of weather")
    send(page, "18 C")
    assert stub.streams.empty()
    messages = answered(page, stub, "21 C", "Rome is warmer.").body["messages"]
    assert [call["id"] for call in messages[1]["tool_calls"]] == ["c0", "c1"]
    assert messages[1]["tool_calls"][0]["function"] == {"name": "weather", "arguments": '{"city": "Paris"}'}
    assert messages[2:] == [
        {"role": "tool", "tool_call_id": "c0", "content": "18 C"},
        {"role": "tool", "tool_call_id": "c1", "content": "21 C"},
    ]
    expect(field(page, "Prompt")).to_have_attribute("placeholder", "Message")


@pytest.mark.parametrize("stop", [lambda page: page.keyboard.press("Escape"), lambda page: page.click("#stop")])
def test_stop_ends_the_request_and_keeps_what_there_is(page, stub, stop):
    send(page, "count")
    stream = stub.next()
    stream.text("1 2 3")
    expect(last(page, ".answer")).to_have_text("1 2 3")
    assert not stream.closed.is_set()
    stop(page)
    assert stream.closed.wait(10)
    expect(last(page, ".facts")).to_contain_text("stopped")
    expect(page.get_by_role("button", name="Stop")).to_be_hidden()
    expect(field(page, "Prompt")).to_be_focused()
    messages = answered(page, stub, "go on", "4").body["messages"]
    assert messages[1] == {"role": "assistant", "content": "1 2 3"}


def test_clear_stops_too_and_what_was_stopped_stays_forgotten(page, stub):
    send(page, "count")
    stream = stub.next()
    stream.text("1 2 3")
    page.get_by_role("button", name="Clear").click()
    assert stream.closed.wait(10)
    assert answered(page, stub, "hello", "hi").body["messages"] == [{"role": "user", "content": "hello"}]


def test_a_refused_request_says_why_and_can_be_sent_again(page, stub):
    message = "temperature must be at least 0, got -1"
    stub.refusal = (400, {"message": message, "type": "invalid_request_error", "param": "temperature", "code": None})
    send(page, "hello")
    expect(page.get_by_role("alert").locator("span")).to_have_text(message)
    expect(page.get_by_role("alert").locator("small")).to_have_text(
        "400 · invalid_request_error · temperature · request r-7"
    )
    expect(field(page, "Prompt")).to_have_value("hello")
    stub.refusal = None
    assert answered(page, stub, "hello", "hi").body["messages"] == [{"role": "user", "content": "hello"}]


def test_a_server_that_is_gone_is_an_error(page, stub):
    page.context.set_offline(True)
    send(page, "hello")
    expect(page.get_by_role("alert")).to_have_text("The server cannot be reached.")
    page.context.set_offline(False)
    answered(page, stub, "hello", "hi")


def test_a_tool_call_that_was_cut_off_is_not_sent_back(page, stub):
    send(page, "weather?")
    stream = stub.next()
    stream.send(chunk({"tool_calls": [{"index": 0, "id": "c0", "function": {"name": "f", "arguments": '{"ci'}}]}))
    stream.end(reason="length")
    expect(last(page, ".facts")).to_contain_text("cut off")
    expect(last(page, ".call")).to_have_text('{"name": "f", "arguments": {"ci}')
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    messages = answered(page, stub, "hello", "hi").body["messages"]
    assert messages[1:] == [{"role": "assistant", "content": ""}, {"role": "user", "content": "hello"}]


def test_an_error_page_of_a_proxy_is_an_error_too(page, stub):
    stub.refusal = (502, "<h1>Bad Gateway</h1>")
    send(page, "hello")
    expect(page.get_by_role("alert")).to_contain_text("Bad Gateway")
    expect(page.get_by_role("alert")).to_contain_text("502")


def test_an_error_in_mid_stream_is_shown_with_what_came_before(page, stub):
    send(page, "hello")
    stream = stub.next()
    stream.text("so far")
    stream.send({"error": {"message": "the engine died", "type": "server_error", "param": None, "code": None}})
    expect(page.get_by_role("alert")).to_contain_text("the engine died")
    expect(last(page, ".answer")).to_have_text("so far")
    assert stream.closed.wait(10)
    assert answered(page, stub, "hello", "hi").body["messages"] == [{"role": "user", "content": "hello"}]


def test_an_answer_that_just_ends_is_an_error(page, stub):
    send(page, "hello")
    stream = stub.next()
    stream.text("so f")
    stream.send_bytes(None)
    expect(page.get_by_role("alert")).to_contain_text("The connection ended before the answer did.")


def test_one_can_type_at_once(open_page, stub):
    page = open_page(stub.url)
    expect(field(page, "Prompt")).to_be_focused()


def test_the_key_is_asked_for_sent_and_kept_in_the_tab_only(open_page, stub):
    stub.api_key = "sesame"
    page = open_page(stub.url)
    expect(page.get_by_role("alert")).to_contain_text("wrong API key")
    expect(field(page, "API key")).to_be_focused()
    page.keyboard.type("sesame")
    page.keyboard.press("Tab")
    expect(field(page, "Model")).to_have_value("stub")
    assert answered(page, stub, "hello", "hi").headers["authorization"] == "Bearer sesame"
    assert page.evaluate("[localStorage.length, document.cookie, Object.values(sessionStorage)]") == [0, "", ["sesame"]]
    page.reload()
    expect(field(page, "Model")).to_have_value("stub")


def test_tokens_per_second_and_the_share_of_the_cache(open_page, stub):
    page = open_page("about:blank")
    page.clock.install(time=0)
    page.goto(stub.url)
    page.clock.pause_at(60_000)
    send(page, "hello")
    stream = stub.next()
    page.clock.run_for(250)
    stream.text("a")
    expect(last(page, ".facts")).to_have_text("≈ 1 tokens · first after 0.25 s")
    page.clock.run_for(1000)
    stream.text("b")
    expect(last(page, ".facts")).to_have_text("≈ 2 tokens · ≈ 1.0 tokens/s · first after 0.25 s")
    page.clock.run_for(1000)
    stream.text("c")
    stream.end(tokens=41, prompt=64, cached=48)
    expect(last(page, ".facts")).to_have_text(
        "41 tokens · 20.0 tokens/s · first after 0.25 s · prompt 64 tokens, 75 % cached"
    )


def test_events_may_be_cut_anywhere(page, stub):
    send(page, "hello")
    stream = stub.next()
    stream.send_bytes(b": keep-alive\r\n\r\n")
    for byte in 'data: {"choices": [{"delta": {"content": "naïve 日本 🙂"}}]}\r\n\r\n'.encode():
        stream.send_bytes(bytes([byte]))
    stream.end()
    expect(last(page, ".answer")).to_have_text("naïve 日本 🙂")


def test_markup_is_text_wherever_it_comes_from(page, stub):
    stub.models = [MARKUP]
    page.reload()
    expect(field(page, "Model")).to_have_value(MARKUP)
    send(page, MARKUP)
    stream = stub.next()
    call = {"index": 0, "id": "c0", "function": {"name": MARKUP, "arguments": MARKUP}}
    stream.send(chunk({"reasoning": MARKUP}), chunk({"content": MARKUP}), chunk({"tool_calls": [call]}))
    stream.send({"error": {"message": MARKUP, "type": MARKUP}})
    for part in (".prompt", ".reasoning .said", ".answer"):
        expect(last(page, part)).to_have_text(MARKUP)
    for part in (".call", ".error span", ".error small"):
        expect(last(page, part)).to_contain_text("<img src=x")
    assert page.locator("img, body script + script").count() == 0
    assert page.evaluate("window.ran") is None


@pytest.mark.parametrize(
    "attack",
    [
        "document.body.innerHTML = '<p>'",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'window.ran = true'}))",
        "document.getElementById('send').setAttribute('onclick', 'window.ran = true')",
    ],
)
def test_the_browser_refuses_markup_and_foreign_scripts(browser, stub, attack):
    page = browser.new_page()
    page.goto(stub.url)
    assert page.evaluate(f"() => {{ try {{ {attack}; }} catch (error) {{ return error.name; }} }}") == "TypeError"
    assert page.evaluate("() => window.ran") is None
    page.close()


def test_enter_sends_shift_enter_does_not(page, stub):
    field(page, "Prompt").press_sequentially("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert stub.streams.empty()
    page.keyboard.press("Enter")
    stream = stub.next()
    assert stream.body["messages"][0]["content"] == "one\ntwo"
    page.keyboard.type("while it answers")
    page.keyboard.press("Enter")
    stream.end()
    expect(page.get_by_role("button", name="Send")).to_be_visible()
    expect(field(page, "Prompt")).to_have_value("while it answers")
    assert stub.streams.empty()


def test_every_control_has_a_name_and_can_be_reached(page):
    unnamed = "els => els.filter(e => !e.labels?.length && !e.textContent.trim()).map(e => e.outerHTML)"
    assert page.locator("input, select, textarea, button").evaluate_all(unnamed) == []
    field(page, "Model").focus()
    reached = []
    for _ in range(14):
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.tagName"))
        page.keyboard.press("Tab")
    wanted = "model clear SUMMARY temperature top_p max_tokens seed thinking system tools key log prompt send"
    assert reached == wanted.split()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_both_schemes(page, scheme):
    page.emulate_media(color_scheme=scheme)
    colors = page.evaluate(
        """() => {
            const probe = document.body.appendChild(document.createElement("i"));
            const names = ["paper", "sheet", "raised", "ink", "faint", "wrong", "accent", "on-accent"];
            return Object.fromEntries(names.map((name) => {
                probe.style.color = `var(--${name})`;
                return [name, getComputedStyle(probe).color.match(/[0-9.]+/g).slice(0, 3).map(Number)];
            }));
        }"""
    )
    pairs = [(ink, back) for ink in ("ink", "faint", "wrong") for back in ("paper", "sheet", "raised")]
    for ink, back in [*pairs, ("on-accent", "accent")]:
        assert contrast(colors[ink], colors[back]) >= 4.5, (ink, back)  # WCAG 2 AA
    light = sum(colors["paper"]) > sum(colors["ink"])
    assert light == (scheme == "light")


def contrast(one: list[float], other: list[float]) -> float:
    """WCAG 2's contrast ratio of two sRGB colours."""

    def luminance(color: list[float]) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (v / 255 for v in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("width", [320, 768, 1440])
def test_nothing_is_wider_than_the_window(page, stub, width):
    page.set_viewport_size({"width": width, "height": 700})
    answered(page, stub, "x" * 300, "y" * 300)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.locator("#log").evaluate("log => log.scrollWidth - log.clientWidth") == 0


def test_the_file_loads_nothing_and_is_allowed_nothing_else():
    page = load_page()
    assert not re.search(r"""(src|href|url|import)\s*[=(]\s*["']?(https?:)?//""", page.body)
    assert len(re.findall("<script|<style", page.body)) == 2
    assert "unsafe" not in page.headers["Content-Security-Policy"]
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'; script-src 'sha256-")


@pytest.fixture(scope="module")
def live_server(live_llm: AsyncLLM) -> Iterator[str]:
    """Where the application as `mili serve` makes it serves the bundled model."""
    with serving(create_app(live_llm, ServerConfig())) as url:
        yield url


@pytest.fixture
def live_page(open_page: Callable[[str], Page], live_server: str) -> Page:
    page = open_page(live_server)
    expect(field(page, "Model")).to_have_value("tiny-qwen3-code")
    return page


def test_live_completions_come_from_the_cache_the_second_time(live_page):
    page = live_page
    page.get_by_text("Complete", exact=True).click()
    field(page, "Seed").fill("1")
    field(page, "Max tokens").fill("16")
    shown = []
    for turn, cached in enumerate((0, 73)):  # 16 of 22 tokens, a page
        send(page, "import os\nimport sys\nfrom pathlib import Path\n\ndef read_lines(path: Path) -> list[str]:\n")
        expect(page.locator("article").nth(turn).locator(".facts")).to_contain_text(
            re.compile(rf"^\d+ tokens · [\d.]+ tokens/s · first after [\d.]+ s · prompt 22 tokens, {cached} % cached")
        )
        shown.append(last(page, ".answer").inner_text())
    assert shown[0] == shown[1] != ""


def test_live_chat_stops_and_the_server_is_free_again(live_page, live_llm):
    page = live_page
    send(page, "hello")
    expect(last(page, ".answer")).not_to_be_empty()
    page.keyboard.press("Escape")
    expect(last(page, ".facts")).to_contain_text("stopped")
    deadline = time.monotonic() + 10
    while live_llm.num_unfinished and time.monotonic() < deadline:
        time.sleep(0.01)
    assert live_llm.num_unfinished == 0


def test_a_live_refusal_says_which_field(live_page):
    page = live_page
    field(page, "Top p").fill("0")
    send(page, "hello")
    expect(page.get_by_role("alert").locator("span")).to_contain_text("top_p must be a finite number in (0, 1], got 0")
    expect(page.get_by_role("alert").locator("small")).to_contain_text("400 · invalid_request_error · top_p")
