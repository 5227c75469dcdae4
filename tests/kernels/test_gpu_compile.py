"""The whole step compiles for a GPU where there is none: the GPU path of every kernel is instantiated and assembled."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from support.checkpoints import write_checkpoint

EM_CUDA = 190  # ELF machine number of device code
NUM_OPS = 8  # embedding, norm, rows, linear, store, attention, silu, sample: each launches one kernel or more


def device_images(artefact: bytes) -> list[bytes]:
    """The ELF images of GPU code inside a compiled graph, each from its header on."""
    images, at = [], artefact.find(b"\x7fELF")
    while at >= 0:
        if int.from_bytes(artefact[at + 18 : at + 20], "little") == EM_CUDA:
            images.append(artefact[at:])
        at = artefact.find(b"\x7fELF", at + 4)
    return images


@pytest.mark.parametrize("options", [[], ["--batch-invariant"]], ids=["fast", "batch-invariant"])
def test_the_step_compiles_for_a_hopper_gpu(tmp_path: Path, options: list[str]) -> None:
    write_checkpoint(tmp_path / "model")
    command = [sys.executable, "-m", "mili", "compile", str(tmp_path / "model"), "--target", "sm_90a"]
    command += ["--dtype", "bfloat16", "-o", str(tmp_path / "out"), *options]
    environment = {**os.environ, "MODULAR_TELEMETRY_ENABLED": "0"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900, check=False)
    assert done.returncode == 0, done.stderr[-4000:]
    note = Path(done.stdout.strip().splitlines()[-1])
    graphs = sorted(note.parent.glob(f"{note.stem}-*.mef"))
    assert [graph.stem.rpartition("-")[2] for graph in graphs] == ["forward", "sampler"]
    images = [device_images(graph.read_bytes()) for graph in graphs]
    assert len(images[0]) >= NUM_OPS - 1, "fewer GPU kernels than ops that have one"
    assert len(images[1]) >= 2, "no GPU kernel for the LM head or for sampling"
    assert "compiling again" not in done.stderr, "the second process failed"


def test_device_images_are_told_from_host_code() -> None:
    host = b"\x7fELF" + bytes(14) + (62).to_bytes(2, "little") + bytes(8)
    cuda = b"\x7fELF" + bytes(14) + EM_CUDA.to_bytes(2, "little") + bytes(8)
    assert device_images(host + b"padding" + host) == []
    assert device_images(b"x" + host + cuda + b"y") == [cuda + b"y"]
