"""The process that `mili bench startup` starts: load a model, make one token, say so, end.

    python -m mili.cli.first_token '{"model": ..., "prompt_len": 512}'

The options are those of `LLM`, and the prompt's length. Prints one line of JSON the moment the token is there, with the
seconds since it began to import; the parent's clock is the one that counts.
"""

import json
import random
import sys
import time


def main(text: str) -> None:
    """Make the token and print the times."""
    begun = time.perf_counter()
    options = json.loads(text)
    prompt_len = options.pop("prompt_len")
    from mili import LLM, SamplingParams

    imported = time.perf_counter()
    with LLM(**options) as llm:
        loaded = time.perf_counter()
        prompt = [random.randrange(llm.model_config.vocab_size) for _ in range(prompt_len)]
        next(llm.stream(prompt, SamplingParams(temperature=0.0, max_tokens=2, ignore_eos=True, detokenize=False)))
        made = time.perf_counter()
        times = {"import_s": imported - begun, "load_s": loaded - imported, "first_token_s": made - loaded}
        print(json.dumps({"model": llm.model, "device": llm.device, "dtype": llm.dtype, **times}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
