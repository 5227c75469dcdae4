"""How close each kernel comes to what this CPU can do: one row a kernel, the last line the same as JSON.

    PYTHONPATH=src:tests python tests/bench/bench_kernels.py [--dtype float32] [--kernel linear] [--seconds 1.0]

Shapes are those of one Qwen3-0.6B layer. Every row is validated before it is timed, with the rule of `kernels.specs`.
Time is the median of many calls on a cold cache: the operands rotate through four times the last-level cache. A call of
the same graph without any rows costs `call` us; it is subtracted, since the network pays it once for all ops. The roof
is measured here and now: what all cores read together, and the fastest matrix product of the libraries at hand. `roof`
is the time that bytes and flops (the formulas of the kernel's header) need at least, over the time taken. On a machine
that does other work, see `load`, the numbers mean little. The first run compiles a graph for each kernel.
"""

import argparse
import json
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from kernels.inputs import Shape
from kernels.specs import BY_NAME, DTYPES, KernelSpec
from mili.cli.device import cpu_read_bandwidth
from support.kernels import Kernels

HIDDEN, INTER, HEADS = 1024, 3072, {"Hq": 16, "Hkv": 8, "D": 128, "S": 16}
MATRICES = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}  # K, N
CASES: list[tuple[str, str, Shape]] = [
    ("embedding", "512 tokens", {"H": HIDDEN, "T": 512, "V": 32768}),
    ("add_rms_norm", "512 tokens", {"H": HIDDEN, "T": 512}),
    ("add_rms_norm_rows", "256 of 512", {"H": HIDDEN, "T": 512, "R": 256}),
    ("silu_mul", "512 tokens", {"I": INTER, "T": 512}),
    ("qk_norm_rope_store", "512 tokens", {**HEADS, "T": 512}),
    *(
        ("linear", f"{name}, {rows} rows", {"K": k, "N": n, "bias": False, "wide": False, "M": rows})
        for rows in (1, 8, 128)
        for name, (k, n) in MATRICES.items()
    ),
    ("paged_attention", "1 x 1 on 4096", {**HEADS, "requests": ((4096, 1),)}),
    ("paged_attention", "16 x 1 on 1024", {**HEADS, "requests": ((1024, 1),) * 16}),
    ("paged_attention", "512 on 512", {**HEADS, "requests": ((512, 512),)}),
]


def llc_bytes() -> int:
    """Size of the last-level cache; 64 MiB if the system does not say."""
    sizes = sorted(Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"))
    text = sizes[-1].read_text().strip() if sizes else "64M"
    return int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]]


def best(run: Callable[[], object], repeats: int = 5) -> float:
    """Seconds of the fastest call."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


def peak_flops(dtype: str, size: int = 2048) -> tuple[float, str]:
    """Multiplications and additions per second of the fastest matrix product found, and what made it."""
    a = np.ones((size, size), np.float32)
    found = [(2 * size**3 / best(lambda: a @ a), "NumPy float32")]
    if dtype == "bfloat16":
        import torch

        b = torch.ones(size, size, dtype=torch.bfloat16)
        found.append((2 * size**3 / best(lambda: b @ b), "torch bfloat16"))
    return max(found)


def median_us(kernels: Kernels, arguments: list[list[Any]], seconds: float) -> float:
    """Median time of a call, going round the argument lists; at least one round more than warms up."""
    times: list[float] = []
    end = time.perf_counter() + seconds
    while len(times) < 2 * len(arguments) or time.perf_counter() < end:
        for given in arguments:
            start = time.perf_counter()
            kernels.execute(given)
            times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times[len(arguments) :]))


def measure(kernels: Kernels, spec: KernelSpec, shape: Shape, seconds: float) -> dict[str, float]:
    """Validate, then time; in us, GB/s and GFLOP/s."""
    rng = np.random.default_rng(0)
    inputs = spec.inputs(rng, shape, kernels.dtype)
    if found := spec.violations(inputs, kernels.run(spec.name, shape, inputs), shape, kernels.dtype):
        raise SystemExit(f"{spec.name} {dict(shape)} is wrong, not timed: {found}")
    size = 2 if kernels.dtype == "bfloat16" else 4
    moved, flops = spec.bytes_moved(shape, size), spec.flops(shape)
    copies = max(2, -(-4 * llc_bytes() // moved))
    call = median_us(kernels, [kernels.idle()], seconds / 4)
    us = median_us(kernels, [kernels.prepare(spec.name, shape, inputs) for _ in range(copies)], seconds) - call
    return {"us": us, "call_us": call, "gb_s": moved / us / 1e3, "gflop_s": flops / us / 1e3}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--kernel", choices=sorted(BY_NAME), help="only this one")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls for each row")
    options = parser.parse_args()
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, last-level cache {llc_bytes() >> 20} MiB, load {load:.1f}")
    bandwidth = cpu_read_bandwidth()
    flops, library = peak_flops(options.dtype)
    print(f"roof: {bandwidth / 1e9:.1f} GB/s read, {flops / 1e9:.0f} GFLOP/s ({library})\n")
    print(f"{'kernel':<20}{'shape':<18}{'us':>10}{'call':>7}{'GB/s':>8}{'GFLOP/s':>9}{'roof':>7}  bound")
    rows = []
    for name in dict.fromkeys(case[0] for case in CASES):
        if options.kernel not in (None, name):
            continue
        spec, cases = BY_NAME[name], [(label, shape) for kernel, label, shape in CASES if kernel == name]
        statics = {tuple((key, shape[key]) for key in spec.statics[0]) for _, shape in cases}
        kernels = Kernels(options.dtype, [(name, dict(static)) for static in sorted(statics)])
        for label, shape in cases:
            row = measure(kernels, spec, shape, options.seconds)
            memory_us = row["us"] * row["gb_s"] * 1e9 / bandwidth
            compute_us = row["us"] * row["gflop_s"] * 1e9 / flops
            bound = "memory" if memory_us > compute_us else "compute"
            share = max(memory_us, compute_us) / row["us"]
            print(
                f"{name:<20}{label:<18}{row['us']:>10.1f}{row['call_us']:>7.1f}{row['gb_s']:>8.1f}"
                f"{row['gflop_s']:>9.1f}{share:>7.0%}  {bound}",
                flush=True,
            )
            rows.append({"kernel": name, "shape": label, **row, "roof": share, "bound": bound})
    summary = {"dtype": options.dtype, "cores": cores, "load": load, "read_gb_s": bandwidth / 1e9}
    print(json.dumps({**summary, "gflop_s": flops / 1e9, "rows": rows}))


if __name__ == "__main__":
    main()
