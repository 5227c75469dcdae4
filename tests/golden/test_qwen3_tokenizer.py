# ruff: noqa: RUF001  texts in many scripts hold letters that look like Latin ones
"""Token ids and rendered chats equal those of transformers, for the real Qwen3 tokenizer and the bundled one."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import transformers

import mili
from mili.tokenizer import Tokenizer
from support.qwen3_tokenizer import qwen3_tokenizer_folder

FOLDERS: dict[str, Callable[[], Path]] = {
    "qwen3": qwen3_tokenizer_folder,
    "bundled": lambda: Path(mili.__file__).parent / "data" / "tiny-qwen3-code",
}


@pytest.fixture(scope="module", params=FOLDERS)
def pair(request: pytest.FixtureRequest) -> tuple[Tokenizer, Any]:
    """(ours, the reference) for one checkpoint."""
    folder = FOLDERS[request.param]()
    return Tokenizer.from_pretrained(folder), transformers.AutoTokenizer.from_pretrained(folder)


TEXTS = [
    "",
    " ",
    "Hello, world! 你好 123",
    "The quick brown fox's 3.14159 jumps; they'LL over -- 'tis 1,000,000 lazy dogs...",
    "Größenänderung naïve façade Ærøskøbing İstanbul ẞ ﬁne",
    "e\u0301 A\u030a \u1e9b\u0323 한글 각",  # decomposed: NFC joins them
    "Привет, как дела? Что нового — «ничего»…",
    "東京の天気は晴れ。明日も、たぶん晴れるでしょう!カタカナ",
    "繁體中文和简体中文混在一起,标点也是。",
    "안녕하세요, 오늘 날씨 어때요?",
    "مرحبا بالعالم! كيف حالك؟ ١٢٣",
    "שלום עולם, מה נשמע?",
    "नमस्ते दुनिया, आप कैसे हैं?",
    "สวัสดีชาวโลก วันนี้อากาศดี",
    "γειά σου Κόσμε ∀x∈ℝ: x² ≥ 0 ⇒ √x ∫∂",
    "👋🏽 👨‍👩‍👧‍👦 🏳️‍🌈 🇩🇪 ☕️ 😀😃😄 👩🏿‍🚀",
    "𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𠜎𠜱 𐍈 \u200b\u200d\ufeff\u00a0",
    'def f(x: int) -> str:\n    """Doc."""\n\treturn f\'{x!r:>10}\'  # no\r\n\r\n\n\n    pass\n',
    '#include <stdio.h>\nint main(void) { return !!printf("%d\\n", 0x1F & ~mask); }',
    "SELECT * FROM `t` WHERE a <> 'b' -- c\n;   \t\t  \n   ",
    '{"a": [1, 2.5e-3, null], "b": {"c": "\\u00e9"}}',
    "<|im_start|>user\nhi<|im_end|>\n<think>\n\n</think>\n\n<tool_call></tool_call><|endoftext|>",
    "a<|im_end|>b <|im_end|> c<|fim_prefix|>d<|im_end|",
    "x" * 3000,
    "a b\n" * 500,
    "\x00\x01\x7f control \x1b[0m",
]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: repr(text[:16]))
def test_token_ids_and_decoding(pair: tuple[Tokenizer, Any], text: str) -> None:
    ours, reference = pair
    ids = ours.encode(text)
    assert ids == reference.encode(text)
    for skip in (False, True):
        assert ours.decode(ids, skip_special_tokens=skip) == reference.decode(ids, skip_special_tokens=skip)


def test_known_ids_of_qwen3() -> None:
    """Ids that Qwen published, so that the rebuilt vocabulary is not only equal to itself."""
    tokenizer = Tokenizer.from_pretrained(qwen3_tokenizer_folder())
    assert tokenizer.encode(TEXTS[2]) == [9707, 11, 1879, 0, 220, 108386, 220, 16, 17, 18]
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (151669, 151645)
    assert tokenizer.token_to_id("<think>") == 151667


def test_every_token_decodes_alike(pair: tuple[Tokenizer, Any]) -> None:
    ours, reference = pair
    assert ours.vocab_size == len(reference)
    step = max(1, ours.vocab_size // 4000)
    ids = [*range(0, ours.vocab_size, step), *range(ours.vocab_size - 30, ours.vocab_size + 200)]
    assert [ours.token_text(i) for i in ids] == [reference.decode([i]) for i in ids]
    skipped = [i for i in ids if reference.decode([i], skip_special_tokens=True) == "" != reference.decode([i])]
    assert [i for i in ids if ours.is_special(i)] == skipped


WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Température & <vent> d'une ville, \"aujourd'hui\" 天气 > 0",
        "parameters": {
            "type": "object",
            "properties": {"city": {"type": "string"}, "days": {"type": "integer", "default": None}},
            "required": ["city"],
        },
    },
}
PLAIN_TOOL = {"name": "noop", "description": "", "parameters": {}}

SYSTEM = {"role": "system", "content": "You are terse. Émile's <b>assistant</b>."}
USER = {"role": "user", "content": "What's the weather in 東京? /no_think"}
CALL = {"type": "function", "id": "c1", "function": {"name": "get_weather", "arguments": {"city": "東京", "days": 2}}}
CHATS: dict[str, list[dict[str, Any]]] = {
    "one turn": [USER],
    "system": [SYSTEM, USER],
    "two systems": [SYSTEM, USER, {"role": "assistant", "content": "Sun."}, SYSTEM, USER],
    "reasoning field": [
        USER,
        {"role": "assistant", "content": "Sunny.", "reasoning_content": "\nThey ask about Tokyo.\n"},
        {"role": "user", "content": "And tomorrow?"},
    ],
    "reasoning in text": [
        USER,
        {"role": "assistant", "content": "<think>\nTokyo, then.\n</think>\n\nSunny."},
        {"role": "user", "content": "And tomorrow?"},
        {"role": "assistant", "content": "<think>\nAgain.\n</think>\n\n\nRain.\n"},
    ],
    "reasoning by vLLM's name": [USER, {"role": "assistant", "content": "Sunny.", "reasoning": "hm"}],
    "tool round": [
        SYSTEM,
        USER,
        {"role": "assistant", "content": "", "reasoning_content": "Call it.", "tool_calls": [CALL, CALL["function"]]},
        {"role": "tool", "content": '{"temp": 21}', "tool_call_id": "c1"},
        {"role": "tool", "content": "<none> & 'quoted'"},
    ],
    "tool round, answered": [
        USER,
        {"role": "assistant", "content": "Let me look.", "tool_calls": [CALL]},
        {"role": "tool", "content": "21 °C"},
        {"role": "assistant", "content": "<think>\n21.\n</think>\n\nIt is 21 °C.", "tool_calls": None},
        {"role": "user", "content": "Thanks"},
    ],
    "arguments as text": [
        USER,
        {"role": "assistant", "content": "x", "tool_calls": [{"function": {"name": "f", "arguments": '{"a": 1}'}}]},
        {"role": "tool", "content": "ok"},
    ],
    "tool response by the user": [USER, {"role": "user", "content": "<tool_response>\n1\n</tool_response>"}],
}


@pytest.mark.parametrize("tools", [None, [WEATHER], [WEATHER, PLAIN_TOOL], []], ids=["none", "one", "two", "empty"])
@pytest.mark.parametrize("options", [{}, {"enable_thinking": True}, {"enable_thinking": False}], ids=str)
@pytest.mark.parametrize("prompt", [True, False], ids=["prompt", "no prompt"])
@pytest.mark.parametrize("chat", CHATS)
def test_chat(pair: tuple[Tokenizer, Any], chat: str, prompt: bool, options: dict[str, Any], tools: Any) -> None:
    ours, reference = pair
    messages = CHATS[chat]
    keywords: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt, **options}
    text = ours.apply_chat_template(messages, tokenize=False, **keywords)
    assert text == reference.apply_chat_template(messages, tokenize=False, **keywords)
    ids = ours.apply_chat_template(messages, **keywords)
    assert ids == reference.apply_chat_template(messages, return_dict=False, **keywords)


STRIPPING = "{% for m in messages %}[{{ m.role }}]{{ m.content | trim }}<|im_end|>{% endfor %}"
PARTS = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}!{% endfor %}"
THINKING = "{% for m in messages %}<think>{{ m.reasoning_content }}</think>{{ m.content }}!{% endfor %}"


@pytest.mark.parametrize(
    ("final", "template", "field"),
    [
        ({"content": "The answer is"}, None, True),
        ({"content": "The answer is  "}, None, True),
        ({"content": "The answer is \n"}, STRIPPING, True),
        ({"content": ""}, None, True),
        ({"content": [{"type": "text", "text": "a "}, {"type": "image"}]}, PARTS, True),
        ({"content": "", "reasoning_content": "First, "}, THINKING, "reasoning_content"),
        ({"content": "", "reasoning": "First, "}, THINKING, "reasoning"),
    ],
)
def test_continue_final_message(
    pair: tuple[Tokenizer, Any], final: dict[str, Any], template: str | None, field: bool | str
) -> None:
    ours, reference = pair
    first = {"role": "user", "content": [{"type": "text", "text": "q"}] if template == PARTS else "q"}
    messages = [first, {"role": "assistant", **final}]
    keywords: dict[str, Any] = {
        "tokenize": False, "add_generation_prompt": False, "continue_final_message": field, "chat_template": template,
    }  # fmt: skip
    text = ours.apply_chat_template(messages, **keywords)
    assert text == reference.apply_chat_template(messages, **keywords)
    assert "CONTINUE" not in text


TEMPLATES = [
    "{{ {'b': '<é>&', 'a': [1, none, true]} | tojson }}{{ {'b': 1, 'a': 2} | tojson(indent=2, sort_keys=true) }}",
    "{% for m in messages %}\n  {% if loop.first %}{% continue %}{% endif %}\n  {{ m.role }}\n{% endfor %}",
    "{% generation %}{{ messages[0].content }}{% endgeneration %}{{ eos_token }}|{{ bos_token }}|{{ pad_token }}",
    "{% set s = namespace(n=0) %}{% for m in messages %}{% set s.n = s.n + 1 %}{% endfor %}{{ s.n }}{{ dict(a=1) }}",
    "{{ strftime_now('%Y') }}{{ tools is none }}{{ documents is none }}{{ nothing is defined }}{{ custom | upper }}",
]


@pytest.mark.parametrize("template", TEMPLATES)
def test_what_templates_may_use(pair: tuple[Tokenizer, Any], template: str) -> None:
    ours, reference = pair
    keywords: dict[str, Any] = {
        "tokenize": False, "chat_template": template, "custom": "straße", "add_generation_prompt": True,
    }  # fmt: skip
    chat = CHATS["reasoning field"]
    assert ours.apply_chat_template(chat, **keywords) == reference.apply_chat_template(chat, **keywords)
