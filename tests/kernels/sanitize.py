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

import numpy as np
from max import driver
from max.driver import Buffer, Device
from max.dtype import DType
from max.engine import InferenceSession
from max.graph import DeviceRef, Graph, TensorType, ops

from kernels.inputs import Shape
from kernels.model_shapes import CASES, MODELS, VOCAB, Case, model_instances, row_index, tiled
from kernels.specs import BY_NAME, DTYPES
from support.graphs import compiled_graph
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


class Race:
    """The kernel that lacks a barrier."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._session = InferenceSession(devices=[device])
        source = str(Path(__file__).parent / "faults" / "__init__.mojo")
        self._compiled = compiled_graph(self._session, device, "race", source, (), self._graph)

    def run(self) -> None:
        """Once."""
        x = Buffer.from_numpy(np.arange(256, dtype=np.int32)).to(self.device)
        self._session.init(self._compiled).execute(x)
        self.device.synchronize()

    def _graph(self) -> Graph:
        kind = TensorType(DType.int32, [256], DeviceRef.from_device(self.device))
        with Graph("race", input_types=[kind], custom_extensions=[Path(__file__).parent / "faults"]) as graph:
            graph.output(ops.custom("fault.race", kind.device, [graph.inputs[0].tensor], [kind])[0])
        return graph


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("ops", nargs="*", metavar="OP", help="only these")
    parser.add_argument("--model", choices=MODELS, default="0.6B", help="whose shapes")
    parser.add_argument("--dtype", choices=DTYPES, help="only this one")
    parser.add_argument("--fault", choices=("memory", "race"), help="make one mistake instead")
    options = parser.parse_args()
    model = MODELS[options.model]
    if options.fault == "race":
        Race(driver.Accelerator()).run()
        return
    for dtype in (options.dtype,) if options.dtype else reversed(DTYPES):  # the one that matters first
        kernels = Kernels(dtype, model_instances(), driver.Accelerator())
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
