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

from llguidance import LLMatcher, LLParserLimits, LLTokenizer

_MEMORY_BYTES = 4 << 30
_STACK_BYTES = 2 << 20  # a quarter of what the threads of a server have: what fits here fits there


def main() -> None:
    """Serve until stdin ends."""
    vocabulary = json.loads(sys.stdin.readline())
    tokenizer = LLTokenizer(vocabulary["tokenizer"], n_vocab=vocabulary["size"], eos_token=vocabulary["eos_token_ids"])
    limits = LLParserLimits(**vocabulary["limits"])
    _answer()
    for line in sys.stdin:
        matcher = LLMatcher(tokenizer, json.loads(line), log_level=0, limits=limits)
        if not matcher.is_error():
            matcher.compute_bitmask()
        _answer()


def _answer() -> None:
    sys.stdout.write(".")
    sys.stdout.flush()


if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    threading.stack_size(_STACK_BYTES)
    thread = threading.Thread(target=main)
    thread.start()
    thread.join()
