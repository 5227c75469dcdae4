"""Compile every graph that the kernel tests and benchmarks need on a GPU into a folder, on a machine without one.

    PYTHONPATH=src:tests python tests/kernels/export.py DIR [--target sm_90a] [--only specs models invariant ...]

On a host with such a GPU, MAX's runtime, and this source tree:

    MILI_TEST_KERNELS=DIR python -m pytest tests/kernels -m gpu

A part is a file or two; `--only` makes some of them. The folder is good for the very sources that made it.
"""

import argparse
import os
import time
from collections.abc import Callable
from pathlib import Path

from max.driver import CPU, Device

from bench import gpu
from kernels.model_shapes import model_instances
from kernels.sanitize import race
from kernels.specs import DTYPES, instances
from kernels.test_batch_invariant import invariant_instances
from kernels.test_sampling import Sampler
from support.graphs import CARRIED, PORTABLE, pretend_gpu
from support.kernels import Kernels


def parts(device: Device) -> dict[str, list[Callable[[], object]]]:
    """For each part the graphs in it."""
    return {
        "specs": [lambda d=dtype: Kernels(d, instances(page_size=16), device) for dtype in DTYPES],
        "models": [lambda d=dtype: Kernels(d, model_instances(), device) for dtype in DTYPES],
        "invariant": [lambda: Kernels("bfloat16", invariant_instances(), device)],
        "sample": [lambda: Sampler(device), lambda: Sampler(CPU(), PORTABLE)],
        "bench": [lambda: gpu.graphs(device)],
        "fault": [lambda: race(device)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--target", default="sm_90a", help="the GPU's architecture")
    parser.add_argument(
        "--only", nargs="+", metavar="PART", help="some of: specs, models, invariant, sample, bench, fault"
    )
    options = parser.parse_args()
    os.environ.pop(CARRIED, None)
    os.environ["MILI_CACHE_DIR"] = str(options.folder)
    for name, graphs in parts(pretend_gpu(options.target)).items():
        if options.only is None or name in options.only:
            for graph in graphs:
                start = time.perf_counter()
                graph()
                print(f"{name}: {time.perf_counter() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main()
