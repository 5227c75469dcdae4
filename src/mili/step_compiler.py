"""Compiles the two graphs of a step, side by side.

    here      forward: kernels to a package ──────┬── graph to machine code ───────────────┬── both
    child     sampler:                            └── graph to machine code ── file ───────┘

MAX compiles one graph at a time in a process, and a good part of that on one core, so the smaller graph gets a process
of its own. Knows MAX's compiler and virtual devices; knows no cache and no weights. Invariant: without the child, for
whatever reason, the same graphs are compiled here, one after the other.
"""

import logging
import os
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from max import driver
from max.driver import CPU, Accelerator
from max.dtype import DType
from max.engine import InferenceSession
from max.engine.api import CompiledModel, read
from max.graph import DeviceRef, Graph

from mili.config import ModelConfig
from mili.models.qwen3 import build_forward, build_sampler

__all__ = ["CompiledStep", "Target", "compile_step", "declare_device"]

log = logging.getLogger(__name__)

# Host code of a GPU artefact only launches kernels: a plain instruction set lets one artefact serve any x86-64 host.
_GPU_HOST_CPU = "x86-64-v3"


@dataclass(frozen=True, slots=True)
class Target:
    """What a graph is compiled for: "cpu" with a fingerprint of its instruction set, or "gpu" with an architecture."""

    kind: str
    arch: str


@dataclass(frozen=True, slots=True, eq=False)
class CompiledStep:
    """The compiled graphs of one step."""

    forward: CompiledModel
    sampler: CompiledModel


@dataclass(frozen=True, slots=True)
class _SamplerJob:
    """What the child is told."""

    config: ModelConfig
    dtype: str
    target: Target
    batch_invariant: bool
    kernels: Path  # precompiled
    output: Path


def compile_step(
    session: InferenceSession,
    config: ModelConfig,
    dtype: str,
    page_size: int,
    target: Target,
    batch_invariant: bool = False,
) -> CompiledStep:
    """Compile the graphs of one step; a GPU `target` needs a real or virtual device of its kind in `session`."""
    device = _device_ref(target)
    graph = build_forward(config, DType[dtype], page_size, device, batch_invariant)
    (kernels,) = graph.kernel_libraries_paths
    with tempfile.TemporaryDirectory(prefix="mili-compile-") as folder:
        job = _SamplerJob(config, dtype, target, batch_invariant, kernels, Path(folder) / "sampler.mef")
        with _child(job, Path(folder) / "errors") as child:
            forward = _compile(session, graph, target)
            sampler = _finish(child, job, Path(folder) / "errors")
    if sampler is None:
        graph = build_sampler(config, DType[dtype], device, batch_invariant, kernels)
        sampler = _compile(session, graph, target)
    return CompiledStep(forward, sampler)


def declare_device(target: Target) -> driver.Device:
    """The device to compile for. A GPU is declared, not looked for, which lasts as long as the process.

    To be called before anything else in the process has looked for a GPU.
    """
    if target.kind == "cpu":
        return CPU()
    driver.set_virtual_device_count(1)
    driver.set_virtual_device_api("cuda")
    driver.set_virtual_device_target_arch(target.arch)
    return Accelerator()


def _device_ref(target: Target) -> DeviceRef:
    return DeviceRef.CPU() if target.kind == "cpu" else DeviceRef.GPU()


def _compile(session: InferenceSession, graph: Graph, target: Target) -> CompiledModel:
    before = driver.get_virtual_cpu_target()
    if target.kind == "gpu":
        driver.set_virtual_cpu_target(_GPU_HOST_CPU)
    try:
        return session.compile(graph)
    finally:
        driver.set_virtual_cpu_target(before)


@contextmanager
def _child(job: _SamplerJob, errors: Path) -> Iterator["subprocess.Popen[bytes] | None"]:
    """The child at work on `job`; it does not outlive the block. None if there can be none."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    try:
        with errors.open("wb") as stderr:
            process = subprocess.Popen(
                [sys.executable, "-P", "-m", __name__],
                env=environment,
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                start_new_session=True,  # Ctrl-C is for us
            )
    except (OSError, TypeError) as error:  # of a type, where Python does not know its own path
        log.warning("no second process to compile in: %s", error)
        yield None
        return
    with process:
        try:
            assert process.stdin is not None
            try:
                process.stdin.write(pickle.dumps(job))
                process.stdin.close()
            except BrokenPipeError:
                pass  # it has ended, and its exit status says so
            yield process
        finally:
            process.kill()


def _finish(child: "subprocess.Popen[bytes] | None", job: _SamplerJob, errors: Path) -> CompiledModel | None:
    """Wait for the child; what it compiled, None if it failed."""
    if child is None:
        return None
    if child.wait() == 0:
        with job.output.open("rb") as file:
            return read(file)
    lines = errors.read_text(errors="replace").strip().splitlines() or [f"status {child.returncode}"]
    log.warning("compiling again: the second process failed (%s)", lines[-1])
    return None


def _work(stdin: BinaryIO) -> None:
    """The child: compile the sampler of the job on stdin."""
    job: Any = pickle.load(stdin)
    session = InferenceSession(devices=[declare_device(job.target)])
    device = _device_ref(job.target)
    graph = build_sampler(job.config, DType[job.dtype], device, job.batch_invariant, job.kernels)
    _compile(session, graph, job.target).export_mef(job.output)


if __name__ == "__main__":
    _work(sys.stdin.buffer)
    sys.stdout.flush()
    os._exit(0)  # taking a virtual device down again is of no use and may fail
