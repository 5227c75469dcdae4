"""The compiled kernels: one graph for each dtype and device, built when a test first asks for it."""

from collections.abc import Callable
from functools import cache

import pytest
from max import driver

from kernels.specs import DTYPES, instances
from support.kernels import Kernels

DEVICES = [pytest.param("cpu"), pytest.param("gpu", marks=pytest.mark.gpu)]


@pytest.fixture(scope="session")
def compiled() -> Callable[[str, str], Kernels]:
    """(device, dtype) -> all instances of `kernels.specs`; those of a GPU know one page size only."""

    @cache
    def build(device: str, dtype: str) -> Kernels:
        if device == "cpu":
            return Kernels(dtype, instances())
        return Kernels(dtype, instances(page_size=16), driver.Accelerator())

    return build


@pytest.fixture(scope="session", params=DTYPES)
def cpu_kernels(request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    """The kernels on the CPU, where results are promised to the bit."""
    return compiled("cpu", request.param)


@pytest.fixture(scope="session", params=DTYPES)
def kernels(device: str, request: pytest.FixtureRequest, compiled: Callable[[str, str], Kernels]) -> Kernels:
    """The kernels on every device there is."""
    return compiled(device, request.param)


@pytest.fixture(scope="session", params=DEVICES)
def device(request: pytest.FixtureRequest) -> str:
    """The CPU, and the GPU where there is one."""
    if request.param == "gpu" and driver.accelerator_count() == 0:
        pytest.skip("needs a GPU")
    return request.param
