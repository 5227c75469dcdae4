"""Where the kernel sources are, and the only place that calls `ops.custom`.

Knows the two homes of `mojo_kernels` (inside the installed package, or at the top of a source tree) and how an op is
placed on a device. Knows nothing of what any op does. Invariant: every custom op of mili is named `mili.<op>` and goes
through here.
"""

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

from max.dtype import DType
from max.graph import BufferValue, DeviceRef, TensorType, TensorValue, ops

__all__ = ["check_tensor", "kernel_op", "kernels_path"]

Parameter = bool | int | str | DType | float


@cache
def kernels_path() -> Path:
    """Return the folder of Mojo sources: package data of an installed mili, else the source tree's `mojo_kernels`."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "mojo_kernels", package.parent.parent / "mojo_kernels"):
        if (folder / "__init__.mojo").is_file():
            return folder
    raise FileNotFoundError(f"mili's Mojo kernels are neither in {package} nor beside its source tree; reinstall mili")


# --8<-- [start:kernel_op]
def kernel_op(
    name: str,
    device: DeviceRef,
    values: Sequence[TensorValue | BufferValue],
    out_types: Sequence[TensorType],
    parameters: Mapping[str, Parameter] | None = None,
) -> list[TensorValue]:
    """Place op `mili.<name>` on `device` and return its outputs; a buffer among `values` makes it an in-place op."""
    placed = ops.inplace_custom if any(isinstance(v, BufferValue) for v in values) else ops.custom
    results = placed(
        f"mili.{name}", device=device, values=list(values), out_types=list(out_types), parameters=dict(parameters or {})
    )
    return [result.tensor for result in results]


# --8<-- [end:kernel_op]


def check_tensor(
    op: str, name: str, value: TensorValue | BufferValue, dtype: DType | tuple[DType, ...], *shape: int | str
) -> None:
    """Raise `ValueError` unless `value` has the dtype (or one of them), the rank of `shape`, and its static dims.

    A string in `shape` stands for a dim that is only known at run time and is not compared.
    """
    allowed = dtype if isinstance(dtype, tuple) else (dtype,)
    if value.dtype not in allowed:
        raise ValueError(f"{op}: {name} has dtype {value.dtype.name}, expected {' or '.join(d.name for d in allowed)}")
    given = [int(d) if str(d).isdigit() else str(d) for d in value.shape]
    known = [(want, have) for want, have in zip(shape, given, strict=False) if not isinstance(have, str)]
    if len(given) != len(shape) or any(not isinstance(want, str) and want != have for want, have in known):
        raise ValueError(f"{op}: {name} has shape {given}, expected {list(shape)}")
