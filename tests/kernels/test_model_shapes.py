"""Every kernel at the shapes of real models, on a GPU; and, without one, that few rows can stand for many, and that
what is timed and what is watched there knows every op."""

import numpy as np
import pytest
from max import driver

from bench import gpu
from kernels import sanitize
from kernels.model_shapes import CASES, MODELS, Case, check, differences, model_instances, row_index
from kernels.specs import BY_NAME, DTYPES
from support.kernels import Kernels
from support.reference import naive

TILED = [case for case in CASES if case.tiles]
SMALL = {"M": 9, "N": 200, "K": 64, "H": 64, "T": 9, "I": 40, "bias": True, "wide": False}


@pytest.fixture(scope="session", params=DTYPES)
def gpu_kernels(request: pytest.FixtureRequest) -> Kernels:
    if driver.accelerator_count() == 0:
        pytest.skip("needs a GPU")
    return Kernels(request.param, model_instances(), driver.Accelerator())


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
@pytest.mark.parametrize("model", MODELS)
def test_a_model(gpu_kernels: Kernels, case: Case, model: str) -> None:
    found = list(check(gpu_kernels, case, MODELS[model]))
    assert not found, "\n".join(found)


@pytest.mark.parametrize("case", TILED, ids=lambda case: case.name)
@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_stand_for_many(case: Case, dtype: str) -> None:
    """The naive result of the whole batch passes, and no longer when two different rows change places."""
    spec = BY_NAME[case.name]
    small = {name: size for name, size in SMALL.items() if name in {"M", "T", *spec.statics[0]}}
    few, index = {**small, **case.tiles}, row_index(case, small, seed=3)
    inputs = spec.inputs(np.random.default_rng(0), few, dtype)
    whole = {p: v[index[case.rows[p][0]]] if p in case.rows else v for p, v in inputs.items()}
    outputs = spec.compute(naive(dtype), whole, small)
    assert not differences(case, few, index, inputs, outputs, dtype)
    for name, dims in case.rows.items():
        for axis, dim in enumerate(dims):
            if name in outputs:
                other = int(np.flatnonzero(index[dim] != index[dim][0])[0])
                swap = np.arange(outputs[name].shape[axis])
                swap[[0, other]] = other, 0
                wrong = {**outputs, name: outputs[name].take(swap, axis)}
                assert differences(case, few, index, inputs, wrong, dtype), f"{name}, axis {axis}"


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_op_has_calls_to_time_and_to_watch(case: Case) -> None:
    spec = BY_NAME[case.name]
    for static in case.statics(MODELS["8B"]):
        for batch in (*gpu.calls(case, static).values(), *sanitize.batches(case, static, "bfloat16")):
            assert spec.bytes_moved({**static, **batch}, 2) > 0
