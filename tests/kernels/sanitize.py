"""A few calls of each kernel, for a tool that watches memory: the results are not looked at, only that there are any.

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py [OP ...]     # and --tool racecheck

Needs a GPU, PYTHONPATH=src:tests, and `MILI_TEST_KERNELS` where there is no compiler. Shapes are those of the smallest
model and small batches, at which every path of a kernel runs and the tools, a hundred times slower, still end.
"""

import sys

import numpy as np
from max import driver

from kernels.inputs import Shape
from kernels.model_shapes import CASES, MODELS, Case, model_instances
from kernels.specs import BY_NAME, DTYPES
from support.kernels import Kernels

LARGEST = 20_000_000  # elements of a weight
ROWS = (1, 7, 12, 33, 65, 600)  # each takes another path of the product


def batches(case: Case, static: Shape, dtype: str) -> list[Shape]:
    """Some of the case's batches, and the shortest contexts."""
    if case.name == "paged_attention":
        decode, mixed = ((1, 1), (17, 1), (700, 1)), ((65, 65), (1, 1), (300, 3))
        return [{"requests": requests} for requests in (decode, ((600, 1),), mixed, ((130, 130),))]
    if "K" in static:
        rows = ROWS if dtype == "bfloat16" else ROWS[1:2]
        return [{"M": count} for count in rows if static["N"] * static["K"] < LARGEST]
    found = case.batches(static)
    return [found[0], found[2], found[3], found[-1]]


def main() -> None:
    chosen = sys.argv[1:] or [case.name for case in CASES]
    model = MODELS["0.6B"]
    for dtype in reversed(DTYPES):  # the one that matters first
        kernels = Kernels(dtype, model_instances(), driver.Accelerator())
        for case in (case for case in CASES if case.name in chosen):
            for static in case.statics(model):
                for batch in batches(case, static, dtype):
                    shape = {**static, **batch}
                    inputs = BY_NAME[case.name].inputs(np.random.default_rng(0), shape, dtype)
                    kernels.run(case.name, shape, inputs)
                    print(dtype, case.name, shape, flush=True)


if __name__ == "__main__":
    main()
