"""Complete a dataset with Ray Data: each actor has its own LLM, Ray splits the rows among them.

Needs `pip install 'mili[ray]'`. On a cluster, run it on the head node; nothing in it changes.
"""

import sys

import ray

from mili import SamplingParams
from mili.ray import Generator

names = ["add", "subtract", "multiply", "divide", "maximum", "minimum", "mean", "median"]
rows = [{"name": name, "prompt": f"def {name}(values: list[float]) -> float:\n"} for name in names]

completed = ray.data.from_items(rows).map_batches(
    Generator,
    fn_constructor_kwargs={
        "model": sys.argv[1] if len(sys.argv) > 1 else None,
        "sampling_params": SamplingParams(temperature=0.0, max_tokens=24),
    },
    batch_size=4,  # rows an actor gets at a time; some multiple of max_num_seqs for real work
    concurrency=2,  # actors
    num_cpus=1,  # each; num_gpus=1 where there are GPUs
)
for row in completed.take_all():  # or completed.write_parquet("completed/"), which streams
    print(f"{row['name']}: {row['num_generated_tokens']} tokens, {row['generated_text'].splitlines()[:1]}")
