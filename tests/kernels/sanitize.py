"""A few calls of each kernel, for a tool that watches memory: the results are not looked at, only that there are any.

    compute-sanitizer --tool memcheck python tests/kernels/sanitize.py [OP ...]     # and --tool racecheck

Needs a GPU, PYTHONPATH=src:tests, and `MILI_TEST_KERNELS` where there is no compiler. Shapes are those of the smallest
model, or of the one that `--model` names, and small batches, at which every path of a kernel runs and the tools, a
hundred times slower, still end. Small batches come first.

MAX takes device memory in large pieces and hands out parts, so that a tool sees only what lies outside of all of them.
`MODULAR_DEVICE_CONTEXT_MEMORY_MANAGER_SIZE=0` makes every array an allocation of its own, but a row past the end of one
still went unseen on an H200: sizes are rounded up. `--fault memory` reads far past the end, `--fault race` leaves out a
barrier (`faults`): to prove that the tool sees it.
"""

import argparse
from pathlib import Path
from typing import Any

import numpy as np
from max import driver
from max.driver import Buffer, Device
from max.dtype import DType

from kernels.inputs import Shape
from kernels.model_shapes import CASES, MODELS, VOCAB, Case, model_instances, row_index, tiled
from kernels.specs import BY_NAME, DTYPES
from kernels.test_sampling import Sampler
from mili.sampling import SamplerState, SamplingRow
from mili.sampling_params import SamplingParams
from support.graphs import LoneOp
from support.kernels import Kernels

# Each number of rows takes another path of the product in one model or the other; a prompt of 600 has several tiles.
ROWS = (1, 3, 7, 12, 20, 33, 65, 130, 250, 600)
HEAD_ROWS = (1, 7, 20, 65)
DECODES = (  # by how many blocks share a request, and how deep their rings are
    ((1, 1),),
    ((700, 1),),
    ((1, 1), (17, 1), (700, 1)),
    ((200, 1),) * 8,
    ((300, 1),) * 8,
    ((300, 1),) * 16,
    ((300, 1),) * 20,
)
PROMPTS = (((65, 65), (1, 1), (300, 3)), ((130, 130),), ((600, 300), (50, 50)))
DRAWS: tuple[dict[str, Any], ...] = (
    {"temperature": 0.0},
    {"temperature": 0.0, "logprobs": 5},
    {},
    {"top_k": 20, "top_p": 0.95},
    {"top_k": 5, "logprobs": 20},
    {"top_p": 0.9},
    {"min_p": 0.1},
    {"top_k": 20, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.3, "logit_bias": {3: 2.0}, "logprobs": 1},
)


def batches(case: Case, static: Shape, dtype: str) -> list[Shape]:
    """What reaches every path of a kernel with the shortest contexts and the fewest rows."""
    if case.name in ("paged_attention", "rope_attention"):
        return [{"requests": requests} for requests in (*DECODES, *PROMPTS)]
    if case.tiles:
        rows = ROWS if static.get("N") != VOCAB else HEAD_ROWS
        return [
            {"M" if case.name == "linear" else "T": count} for count in (rows if dtype == "bfloat16" else rows[2:3])
        ]
    found = case.batches(static)
    return [found[0], found[2], found[3], found[-1]]


def read_past_the_end(kernels: Kernels, static: Shape) -> None:
    """Ask the embedding for a row a gigabyte behind its table's last: a mistake that the tool must see."""
    shape = {**static, "T": 1, "V": 1003}
    inputs = BY_NAME["embedding"].inputs(np.random.default_rng(0), shape, kernels.dtype)
    kernels.run("embedding", shape, {**inputs, "token_ids": np.array([1 << 19], np.int32)})


def race(device: Device) -> LoneOp:
    """The kernel that lacks a barrier."""
    return LoneOp(device, "fault.race", Path(__file__).parent / "faults", DType.int32, [256], [256])


def draw(sampler: Sampler) -> None:
    """Batches of rows that want different things, of vocabularies of different sizes."""
    rng = np.random.default_rng(0)
    for vocab in (33, 8193, VOCAB):
        rows = [SamplerState(SamplingParams(**params), [1, 5, 7], seed=i).row() for i, params in enumerate(DRAWS)]
        mask = rng.integers(-(2**31), 2**31, -(-vocab // 32), np.int32)
        rows += [rows[0]._replace(mask=mask), rows[-1]._replace(mask=mask), SamplingRow.scoring(3, 20)]
        for count in (1, len(rows)):
            sampler.rows(rng.standard_normal((count, vocab), np.float32), rows[:count])
            print("sample", vocab, count, flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these")
    parser.add_argument("--model", choices=MODELS, default="0.6B", help="whose shapes")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--fault", choices=("memory", "race"), help="make one mistake instead")
    options = parser.parse_args()
    model = MODELS[options.model]
    device = driver.Accelerator()
    if options.fault == "race":
        race(device).load().execute(Buffer.from_numpy(np.arange(256, dtype=np.int32)).to(device))
        device.synchronize()
        return
    if not options.fault and "sample" in (options.ops or ("sample",)):
        draw(Sampler(device))
    if options.ops == ["sample"]:
        return
    for dtype in (options.dtype,) if options.dtype else reversed(DTYPES):  # the one that matters first
        kernels = Kernels(dtype, model_instances(), device)
        if options.fault:
            read_past_the_end(kernels, {"H": model.hidden})
            return
        for case in (case for case in CASES if case.name in (options.ops or BY_NAME)):
            for static in case.statics(model):
                for batch in batches(case, static, dtype):
                    shape = {**static, **batch}
                    inputs = BY_NAME[case.name].inputs(np.random.default_rng(0), {**shape, **case.tiles}, dtype)
                    kernels.run(case.name, shape, tiled(case, inputs, row_index(case, shape, 0)))
                    print(dtype, case.name, shape, flush=True)


if __name__ == "__main__":
    main()
