"""Multiply-adds per second of the CPU engines: `python -m benchmarks.gemm_cpu`.

The CPU engines exist to check bits where there is no GPU; the stock matmul stands beside them for scale.
"""

import os
import sys
import time
from collections.abc import Callable
from statistics import median

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import torch
from rich.console import Console
from rich.table import Table

import bi_jax
import bi_torch
from bi_bridge import to_jax

SHAPES = ((1, 4096, 4096), (16, 1024, 4096), (256, 256, 1024))


def seconds(call: Callable[[], object], repeats: int = 3) -> float:
    """Median time of a call, after one that compiles."""
    call()
    samples = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        samples.append(time.perf_counter() - start)
    return median(samples)


def main() -> int:
    """Measure and print."""
    jitted = jax.jit(bi_jax.mm)
    table = Table(title=f"multiply-adds per second on {torch.get_num_threads()} threads", title_justify="left")
    for name in ("dtype", "M", "N", "K", "torch.mm", "bi_torch.mm", "jax.jit(bi_jax.mm)"):
        table.add_column(name, justify="left" if name == "dtype" else "right")
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        for m, n, k in SHAPES:
            a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
            jax_a, jax_b = to_jax(a), to_jax(b)
            times = (
                seconds(lambda a=a, b=b: torch.mm(a, b)),  # type: ignore[misc]
                seconds(lambda a=a, b=b: bi_torch.mm(a, b)),  # type: ignore[misc]
                seconds(lambda a=jax_a, b=jax_b: jax.block_until_ready(jitted(a, b))),  # type: ignore[misc]
            )
            table.add_row(str(dtype).removeprefix("torch."), str(m), str(n), str(k), *(f"{m * n * k / t:.1e}" for t in times))
    Console().print(table)
    return 0


if __name__ == "__main__":
    sys.exit(main())
