"""Compiled test graphs: made once, kept under a key of all that went into them, carried to hosts that cannot compile.

A GPU host without a compiler runs what another machine compiled: `python tests/kernels/export.py DIR` fills a folder,
and on the host, beside the same sources, `MILI_TEST_KERNELS=DIR` names it. Then nothing is compiled, and a graph that
is not there is an error. Without the variable graphs are kept in mili's cache folder, with the time of their last use.
Knows no op. Invariant: a kept graph is used only under a key made of the kernels, their wrappers, the caller's own file
and facts, MAX, the device and the host's instruction set.
"""

import hashlib
import os
import tempfile
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

from max import driver
from max.driver import Device
from max.dtype import DType
from max.engine import InferenceSession, Model
from max.engine.api import CompiledModel, read
from max.graph import DeviceRef, Graph, TensorType, ops

from mili import ops as wrappers
from mili.compiler import cache_folder, target_of
from mili.ops import _call

CARRIED = "MILI_TEST_KERNELS"
PORTABLE = "x86-64-v3"  # a CPU target for graphs that are carried; enough beside a GPU, where it only launches kernels


def pretend_gpu(architecture: str) -> Device:
    """A GPU that is not there, to compile for; to be called before anything in the process has looked for one."""
    driver.set_virtual_device_count(1)
    driver.set_virtual_device_api("cuda")
    driver.set_virtual_device_target_arch(architecture)
    return driver.Accelerator()


def compiled_graph(
    session: InferenceSession,
    device: Device,
    name: str,
    source: str,
    facts: object,
    build: Callable[[], Graph],
    cpu_target: str | None = None,
) -> CompiledModel:
    """The graph `name` that `build` makes for `device`, compiled now or at some time before.

    `source` is the caller's file and `facts` has a repr of all else that `build` depends on. `cpu_target` names the
    instruction set of the host's code, such as "x86-64-v3": by default this machine's, or `PORTABLE` beside a GPU.
    """
    target = f"cpu {cpu_target}" if device.is_host and cpu_target else target_of(device)
    cpu_target = cpu_target or (driver.get_virtual_cpu_target() if device.is_host else PORTABLE)
    digest = hashlib.sha256(repr((version("max"), target, facts)).encode())
    python = Path(wrappers.__file__).parent.glob("*.py")
    for file in sorted([*_call.kernels_path().glob("*.mojo"), *python, Path(source)], key=lambda f: f.name):
        digest.update(file.name.encode() + b"\0" + file.read_bytes() + b"\0")
    carried = os.environ.get(CARRIED)
    path = (Path(carried) if carried else cache_folder()) / f"{name}-{digest.hexdigest()[:32]}.mef"
    if path.is_file():
        if not carried:
            path.touch()
        return read(path)
    if carried:
        have = ", ".join(sorted(file.name for file in Path(carried).glob("*.mef"))) or "no graph"
        raise FileNotFoundError(f"{CARRIED}: {path} is not there, only {have}: export it again, from these sources")
    before = driver.get_virtual_cpu_target()
    driver.set_virtual_cpu_target(cpu_target)
    try:
        compiled = session.compile(build())
    finally:
        driver.set_virtual_cpu_target(before)
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:  # a reader never sees half a file
        compiled.export_mef(f"{folder}/{path.name}")
        os.replace(f"{folder}/{path.name}", path)
    return compiled


class LoneOp:
    """A graph of one op, of a Mojo package that is not mili's: one array in, one of the same dtype out."""

    def __init__(
        self, device: Device, op: str, package: Path, dtype: DType, given: list[str | int], made: list[int]
    ) -> None:
        """Compiled now or before; `given` and `made` are the shapes."""
        name = op.rpartition(".")[2]

        def build() -> Graph:
            kind = TensorType(dtype, given, DeviceRef.from_device(device))
            with Graph(name, input_types=[kind], custom_extensions=[package]) as graph:
                out = TensorType(dtype, made, kind.device)
                graph.output(ops.custom(op, kind.device, [graph.inputs[0].tensor], [out])[0])
            return graph

        self._session = InferenceSession(devices=[device])
        source, facts = str(package / "__init__.mojo"), (op, str(dtype), given, made)
        self._compiled = compiled_graph(self._session, device, name, source, facts, build)

    def load(self) -> Model:
        """Onto the device."""
        return self._session.init(self._compiled)
