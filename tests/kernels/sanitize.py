"""A few calls of each kernel, for a tool that watches memory: the results are not looked at, only that there are any.

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py [OP ...]     # and --tool racecheck

Needs a GPU, PYTHONPATH=src:tests, and `MILI_TEST_KERNELS` where there is no compiler. Shapes are those of the smallest
model and small batches, at which every path of a kernel runs and the tools, a hundred times slower, still end.

MAX takes device memory in large pieces and hands out parts, so that a tool sees only what lies outside of all of them.
`MODULAR_DEVICE_CONTEXT_MEMORY_MANAGER_SIZE=0` makes every array an allocation of its own; `--fault` reads past the end
of one, to prove that the tool sees it.
"""

import argparse

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


def read_past_the_end(kernels: Kernels, static: Shape) -> None:
    """Ask the embedding for the row after its table's last: a mistake that the tool must see."""
    shape = {**static, "T": 1, "V": 1003}
    inputs = BY_NAME["embedding"].inputs(np.random.default_rng(0), shape, kernels.dtype)
    kernels.run("embedding", shape, {**inputs, "token_ids": np.array([1003], np.int32)})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these")
    parser.add_argument("--fault", action="store_true", help="make one mistake instead")
    options = parser.parse_args()
    model = MODELS["0.6B"]
    for dtype in reversed(DTYPES):  # the one that matters first
        kernels = Kernels(dtype, model_instances(), driver.Accelerator())
        if options.fault:
            read_past_the_end(kernels, {"H": model.hidden})
            return
        for case in (case for case in CASES if case.name in (options.ops or BY_NAME)):
            for static in case.statics(model):
                for batch in batches(case, static, dtype):
                    shape = {**static, **batch}
                    inputs = BY_NAME[case.name].inputs(np.random.default_rng(0), shape, dtype)
                    kernels.run(case.name, shape, inputs)
                    print(dtype, case.name, shape, flush=True)


if __name__ == "__main__":
    main()
