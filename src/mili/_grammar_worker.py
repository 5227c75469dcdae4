"""Compiles grammars one after the other in a process of its own, which `mili.grammar_trial` starts and may kill.

It knows llguidance and two pipes and imports nothing of mili: it is run by its path. Invariant: a byte is written for
the vocabulary and for each grammar once it is compiled, rightly or with an error; what happens else ends the process.

    stdin    {"vocabulary": tokenizer.json, ...} | "grammar" | "grammar" | ...      one JSON value a line
    stdout                                       .           .           .
"""

import json
import resource
import sys
import threading

import numpy as np
from llguidance import LLMatcher, LLParserLimits, LLTokenizer
from llguidance.numpy import allocate_token_bitmask, fill_next_token_bitmask

_MEMORY_BYTES = 4 << 30
_STACK_BYTES = 2 << 20  # a quarter of what the threads of a server have: what fits here fits there


def main() -> None:
    """Serve until stdin ends."""
    vocabulary = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["size"], eos_token=vocabulary["eos_token_ids"])
    limits = LLParserLimits(**vocabulary["limits"])
    mask = allocate_token_bitmask(1, vocabulary["size"])  # [1, ceil(V / 32)]
    _answer()
    for line in sys.stdin:
        _compile(tokenizer, json.loads(line), limits, mask)
        _answer()


def _compile(tokenizer: LLTokenizer, grammar: str, limits: LLParserLimits, mask: np.ndarray) -> None:
    matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=limits)
    if not matcher.is_error():
        fill_next_token_bitmask(matcher, mask)


def _answer() -> None:
    sys.stdout.write(".")
    sys.stdout.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
