"""Print text while it is made, then say how long the first token and the others took."""

import sys

from mili import LLM, SamplingParams

with LLM(*sys.argv[1:2]) as llm:
    params = SamplingParams(temperature=0.7, top_p=0.95, seed=7, max_tokens=80, stop=["\n\n\n"])
    prompt = "class Stack:\n    def __init__(self"
    print(prompt, end="")
    for output in llm.stream(prompt, params):
        print(output.delta, end="", flush=True)

metrics, num_tokens = output.metrics, len(output.outputs[0].token_ids)
decode_seconds = metrics.finished_time - metrics.first_token_time
print(f"\n\nfirst token after {metrics.time_to_first_token * 1e3:.0f} ms", end="")
if num_tokens > 1:
    print(f", then {decode_seconds / (num_tokens - 1) * 1e3:.1f} ms each", end="")
print(f"; finished by {output.outputs[0].finish_reason}")
