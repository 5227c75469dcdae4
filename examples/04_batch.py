"""Serve many requests at once, each with its own parameters, and draw several samples of one prompt."""

import sys
import time

from mili import LLM, SamplingParams

names = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "mean", "median"]
header = '"""Functions on lists of numbers."""\n\nimport math\nfrom collections.abc import Sequence\n\n\n'
prompts = [f"{header}def {name}(values: Sequence[float]) -> float:\n" for name in names]
params = [SamplingParams(temperature=0.2 * i, seed=i, max_tokens=24 + i) for i in range(len(names))]

with LLM(*sys.argv[1:2], max_num_seqs=16) as llm:
    start = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - start
    for name, output in zip(names, outputs, strict=True):
        print(f"{name}: {output.num_cached_tokens} tokens cached, then {output.text.splitlines()[:1]}")
    num_tokens = sum(len(output.outputs[0].token_ids) for output in outputs)
    print(f"{num_tokens} tokens of {len(outputs)} requests in {seconds:.2f} s: {num_tokens / seconds:.0f} tok/s")

    (output,) = llm.generate("import ", SamplingParams(n=4, temperature=1.0, seed=1, max_tokens=6), use_tqdm=False)
    print("four continuations of 'import ':", [completion.text for completion in output.outputs])
    print("prefix cache hits:", llm.get_metrics()["prefix_cache_hits_total"], "tokens")
