"""Complete a piece of code with the model that comes with mili; another model's folder or name can be an argument."""

import sys

from mili import LLM, SamplingParams

with LLM(*sys.argv[1:2]) as llm:
    params = SamplingParams(temperature=0.0, max_tokens=48, logprobs=1)
    (output,) = llm.generate("def fibonacci(n):\n", params)

completion = output.outputs[0]
print(output.prompt + completion.text)
print(f"\n{len(completion.token_ids)} tokens, finished by {completion.finish_reason}")
print(f"mean log-probability {completion.cumulative_logprob / len(completion.token_ids):.3f}")
