"""The compiled kernels: one graph for each dtype and device, built when a test first asks for it."""

import platform
from collections.abc import Callable
from functools import cache

import pytest
from max import driver

from kernels.specs import DTYPES, instances
from support.graphs import PORTABLE
from support.kernels import Kernels

Build = Callable[[tuple[str, str]], Kernels]

# "avx2" is a CPU without AVX-512: narrower vectors, other tiles, no bfloat16 dot product.
CPUS = [pytest.param(pair, id="-".join(pair)) for pair in (*(("cpu", d) for d in DTYPES), ("avx2", "bfloat16"))]
GPUS = [pytest.param(("gpu", d), id=f"gpu-{d}", marks=pytest.mark.gpu) for d in DTYPES]


@pytest.fixture(scope="session")
def compiled() -> Build:
    """(device, dtype) -> all instances of `kernels.specs`; those of a GPU know one page size only."""

    @cache
    def build(pair: tuple[str, str]) -> Kernels:
        device, dtype = pair
        if device == "gpu":
            if driver.accelerator_count() == 0:
                pytest.skip("needs a GPU")
            return Kernels(dtype, instances(page_size=16), driver.Accelerator())
        if device == "avx2" and platform.machine() != "x86_64":
            pytest.skip("needs an x86-64 CPU")
        return Kernels(dtype, instances(), cpu_target=PORTABLE if device == "avx2" else None)

    return build


@pytest.fixture(scope="session", params=CPUS)
def cpu_kernels(request: pytest.FixtureRequest, compiled: Build) -> Kernels:
    """The kernels on the CPU, where results are promised to the bit."""
    return compiled(request.param)


@pytest.fixture(scope="session", params=[*CPUS, *GPUS])
def kernels(request: pytest.FixtureRequest, compiled: Build) -> Kernels:
    """The kernels on every device there is."""
    return compiled(request.param)
