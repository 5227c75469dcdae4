"""How close each kernel comes to what the device can do: one row a call, the last line the same as JSON.

    PYTHONPATH=src:tests python tests/bench/bench_kernels.py [--dtype float32] [--kernel linear] [--seconds 1.0]
    PYTHONPATH=src:tests python tests/bench/bench_kernels.py --device gpu [--kernel linear]

On the CPU shapes are those of one Qwen3-0.6B layer. Every row is validated before it is timed, with the rule of
`kernels.specs`. Time is the median of many calls on a cold cache: the operands rotate through four times the last-level
cache. A call of the same graph without any rows costs `call` us; it is subtracted, since the network pays it once for
all ops. The roof is measured here and now: what all cores read together, and the fastest matrix product of the
libraries at hand. On a machine that does other work, see `load`, the numbers mean little.

On a GPU shapes are those of 0.6B and 8B, decode and prompts, in bfloat16, timed as `bench.gpu` says; what is right is
the business of `tests/kernels -m gpu`. The roof is what a kernel that only reads gets from memory, here and now, and
the larger of what `mili.cli.device` states for the matrix unit and what the largest product reaches here.
A host without a compiler runs what another machine compiled, from the same sources:

    python tests/bench/bench_kernels.py --export DIR [--target sm_90a]      # needs no GPU
    python tests/bench/bench_kernels.py --device gpu --from DIR

`roof` is the time that bytes and flops (the formulas of the kernel's header) need at least, over the time taken. The
first run compiles.
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
from max import driver

from bench import gpu
from kernels.inputs import Shape
from kernels.model_shapes import CASES as MODEL_CASES
from kernels.model_shapes import MODELS, VOCAB
from kernels.specs import BY_NAME, DTYPES, KernelSpec
from mili.cli.device import cpu_read_bandwidth, gpu_matrix_rate
from support.graphs import CARRIED, pretend_gpu
from support.kernels import Kernels

HIDDEN, INTER, HEADS = 1024, 3072, {"Hq": 16, "Hkv": 8, "D": 128, "S": 16}
MATRICES = {"qkv": (1024, 4096), "o": (2048, 1024), "gate_up": (1024, 6144), "down": (3072, 1024)}  # K, N
CASES: list[tuple[str, str, Shape]] = [
    ("embedding", "512 tokens", {"H": HIDDEN, "T": 512, "V": 32768}),
    ("add_rms_norm", "512 tokens", {"H": HIDDEN, "T": 512}),
    ("take_rows", "256 of 512", {"A": 2 * HIDDEN, "H": HIDDEN, "T": 512, "R": 256}),
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
SAMPLERS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "top-k 20, top-p 0.95": {"temperature": 0.6, "top_k": 20, "top_p": 0.95},
}


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


def bench_cpu(options: argparse.Namespace) -> None:
    """The rows of the CPU."""
    cores, load = len(os.sched_getaffinity(0)), os.getloadavg()[0]
    print(f"{platform.machine()}, {cores} cores, last-level cache {llc_bytes() >> 20} MiB, load {load:.1f}")
    bandwidth = cpu_read_bandwidth()
    flops, library = peak_flops(options.dtype)
    table = Table(bandwidth, flops, f"{library}")
    for name in dict.fromkeys(case[0] for case in CASES):
        if options.kernel not in (None, name):
            continue
        spec, cases = BY_NAME[name], [(label, shape) for kernel, label, shape in CASES if kernel == name]
        statics = {tuple((key, shape[key]) for key in spec.statics[0]) for _, shape in cases}
        kernels = Kernels(options.dtype, [(name, dict(static)) for static in sorted(statics)])
        for label, shape in cases:
            table.add(name, label, **measure(kernels, spec, shape, options.seconds))
    table.end(dtype=options.dtype, cores=cores, load=load)


def bench_gpu(options: argparse.Namespace) -> None:
    """The rows of a GPU."""
    device = driver.Accelerator()
    kernels, clock, sampler = gpu.graphs(device)
    bandwidth = clock.start()
    (linear,) = (case for case in MODEL_CASES if case.name == "linear")
    square = {**gpu.SQUARE, "M": 8192}
    own = BY_NAME["linear"].flops(square) / gpu.time_case(clock, kernels, linear, square, copies=1)
    stated = gpu_matrix_rate(device.architecture_name, "bfloat16")
    table = Table(
        bandwidth, max(own, stated or 0.0), f"stated {stated}, own product of 8192 cubed {own / 1e12:.0f} TFLOP/s"
    )
    for case in MODEL_CASES:
        if options.kernel not in (None, case.name):
            continue
        spec, seen = BY_NAME[case.name], []
        for size in gpu.SIZES:
            for static in case.statics(MODELS[size]):
                if static in seen:
                    continue
                seen.append(static)
                dims = " ".join(str(value) for key, value in static.items() if key not in ("S", "bias", "wide"))
                held: dict[str, Any] = {}
                for label, batch in gpu.calls(case, static).items():
                    shape = {**static, **batch}
                    us = 1e6 * gpu.time_case(clock, kernels, case, shape, held=held)
                    moved, flops = spec.bytes_moved(shape, 2), spec.flops(shape)
                    table.add(case.name, f"{size} {dims}, {label}", us, moved / us / 1e3, flops / us / 1e3)
    if options.kernel in (None, "sample"):
        for rows in (1, 64, 256):
            for label, params in (
                ("greedy", {"temperature": 0.0}),
                ("top-k 20, top-p 0.95", {"top_k": 20, "top_p": 0.95}),
            ):
                us = 1e6 * gpu.time_sampler(clock, sampler, rows, VOCAB, **params)
                table.add("sample", f"{label}, {rows} rows", us, 4 * rows * VOCAB / us / 1e3, 0.0)
    table.end(dtype="bfloat16", device=str(device))


class Table:
    """Rows as they come, and all of them as JSON at the end."""

    def __init__(self, bytes_per_s: float, flops_per_s: float, source: str) -> None:
        self.bytes_per_s, self.flops_per_s, self.rows = bytes_per_s, flops_per_s, list[dict[str, Any]]()
        print(f"roof: {bytes_per_s / 1e9:,.1f} GB/s read, {flops_per_s / 1e9:,.0f} GFLOP/s ({source})\n")
        print(f"{'kernel':<19}{'shape':<38}{'us':>10}{'GB/s':>8}{'GFLOP/s':>10}{'roof':>6}  bound", flush=True)

    def add(self, name: str, label: str, us: float, gb_s: float, gflop_s: float, **more: float) -> None:
        """Print a row."""
        memory, compute = gb_s * 1e9 / self.bytes_per_s, gflop_s * 1e9 / self.flops_per_s
        share, bound = max(memory, compute), "memory" if memory > compute else "compute"
        print(f"{name:<19}{label:<38}{us:>10.2f}{gb_s:>8.1f}{gflop_s:>10.1f}{share:>6.0%}  {bound}", flush=True)
        row = {"kernel": name, "shape": label, "us": us, **more, "gb_s": gb_s, "gflop_s": gflop_s}
        self.rows.append({**row, "roof": share, "bound": bound})

    def end(self, **facts: Any) -> None:
        """Print the JSON."""
        roof = {"read_gb_s": self.bytes_per_s / 1e9, "gflop_s": self.flops_per_s / 1e9}
        print(json.dumps({**facts, **roof, "rows": self.rows}))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16", help="on the CPU")
    parser.add_argument("--kernel", choices=sorted([*BY_NAME, "sample"]), help="only this one")
    parser.add_argument("--seconds", type=float, default=1.0, help="of calls for each row, on the CPU")
    parser.add_argument("--export", type=Path, metavar="DIR", help="compile for a GPU into DIR, and time nothing")
    parser.add_argument("--target", default="sm_90a", help="the GPU's architecture, for --export")
    parser.add_argument("--from", dest="carried", type=Path, metavar="DIR", help="where the compiled graphs are")
    options = parser.parse_args()
    if options.export:
        os.environ.pop(CARRIED, None)
        os.environ["MILI_CACHE_DIR"] = str(options.export)
        gpu.graphs(pretend_gpu(options.target))
        return
    if options.carried:
        os.environ[CARRIED] = str(options.carried)
    (bench_gpu if options.device == "gpu" else bench_cpu)(options)


if __name__ == "__main__":
    main()
