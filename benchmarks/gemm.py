"""GEMM against cuBLAS on the projections of three models: `python -m benchmarks.gemm`.

The weights are stored [N, K] as in torch.nn.Linear, shared between the frameworks without a copy, and rotated so that no
call finds its weight in the L2 cache. Ratios are to torch.mm in the same run; above 1 is faster. Each weight shape has a
process of its own; they compile side by side and take turns on the GPU.
"""

import argparse
import importlib
import importlib.util
import os
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# XLA's command buffers are CUDA graphs; as in a graph captured from a stream, one kernel runs after another.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_command_buffer_scheduling_mode=SERIALIZE"

import jax
import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

import bi_jax
import bi_torch
from benchmarks.accuracy import Accuracy, accuracy, accuracy_table
from benchmarks.report import Measurement, measurement_table, summarise, summary_table, write_json, write_plot
from benchmarks.shapes import MODELS, ROWS
from benchmarks.timing import Program, host_microseconds, jax_program, microseconds, torch_program
from benchmarks.turns import in_turns, ready, turn
from bi_bridge import to_jax
from shared_specs import gemm_contract

BASELINE = "cuBLAS"
PYTORCH = "bi_torch"
JAX = "bi_jax"
DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
L2_MULTIPLE = 8
"""The weights of one program take at least this many times the L2 cache, or one weight does."""
CALLS = 16
"""Calls of one program, at least; XLA makes a command buffer of five kernels and more."""
OUTPUT_BYTES = 1 << 29
"""But fewer, where the outputs of so many would take more than this."""

TorchCall = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def torch_columns() -> dict[str, TorchCall]:
    """The columns that PyTorch runs: x [M, K] and a weight [N, K] to [M, N]."""
    columns: dict[str, TorchCall] = {BASELINE: lambda x, w: torch.mm(x, w.t()), PYTORCH: bi_torch.linear}
    others = {"batch_invariant_ops": "batch_invariant_ops", "vLLM": "vllm.model_executor.layers.batch_invariant"}
    for name, module in others.items():
        if importlib.util.find_spec(module.partition(".")[0]):
            matmul = importlib.import_module(module).matmul_persistent
            columns[name] = lambda x, w, matmul=matmul: matmul(x, w.t())  # type: ignore[misc]
    return columns


def environment(dtype: str) -> dict[str, str]:
    """The GPU and the versions that the numbers belong to."""
    major, minor = torch.cuda.get_device_capability()
    return {
        "gpu": f"{torch.cuda.get_device_name()} (sm_{major}{minor})",
        "torch": torch.__version__,
        "triton": triton.__version__,
        "jax": jax.__version__,
        "cuda": str(torch.version.cuda),
        "contract": gemm_contract(dtype).contract_id,
    }


def shapes(models: list[str]) -> dict[tuple[int, int], str]:
    """(N, K) of the models' projections with a label each; a shape that several models share is measured once."""
    labels: dict[tuple[int, int], list[str]] = {}
    for model in models:
        for projection in MODELS[model]:
            labels.setdefault((projection.n, projection.k), []).append(f"{model} {projection.name}")
    return {shape: ", ".join(names) for shape, names in labels.items()}


def rotated_weights(n: int, k: int, dtype: torch.dtype) -> list[torch.Tensor]:
    """Weights [n, k] that together do not fit the L2 cache."""
    l2 = torch.cuda.get_device_properties().L2_cache_size
    count = -(-L2_MULTIPLE * l2 // (n * k * dtype.itemsize))
    return [torch.empty(n, k, device="cuda", dtype=dtype).normal_(std=k**-0.5) for _ in range(count)]


def measure(args: argparse.Namespace, console: Console) -> list[Measurement]:
    """Every column for every shape and every M."""
    calls = [(label, n, k, args.dtype, args.m, args.columns) for (n, k), label in shapes(args.models).items()]
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, transient=True) as progress:
        results = progress.track(in_turns(measure_shape, calls), total=len(calls), description="shapes")
        return sorted((m for result in results for m in result), key=lambda m: (m.k, m.n, m.m))


def measure_shape(label: str, n: int, k: int, dtype: str, batches: list[int], names: list[str]) -> list[Measurement]:
    """Every column for one weight shape and every M; a process of its own runs this."""
    torch.set_float32_matmul_precision("highest")
    contenders = {name: call for name, call in torch_columns().items() if name == BASELINE or name in names}
    weights = rotated_weights(n, k, DTYPES[dtype])
    inputs = [torch.empty(m, k, device="cuda", dtype=DTYPES[dtype]).normal_() for m in batches]
    in_jax: list[Program | None] = [None] * len(inputs)
    for i, x in enumerate(inputs):
        for call in contenders.values():
            call(x, weights[0])  # compiles
        if JAX in names:
            in_jax[i] = jax_program(bi_jax.linear, [(to_jax(x), to_jax(w)) for w in repeated(weights, len(x))])
    torch.cuda.empty_cache()
    ready()
    measurements = []
    for x, program in zip(inputs, in_jax, strict=True):
        with turn():
            arguments = [(x, w) for w in repeated(weights, len(x))]
            programs = {name: torch_program(call, arguments) for name, call in contenders.items()}
            if program is not None:
                programs[JAX] = program
            measurements.append(Measurement(label, len(x), n, k, microseconds(programs)))
            del programs
            torch.cuda.empty_cache()
    return measurements


def repeated(weights: list[torch.Tensor], m: int) -> list[torch.Tensor]:
    """The weights of one program, over and over until they make enough calls."""
    output = m * weights[0].shape[0] * weights[0].element_size()
    calls = max(len(weights), min(CALLS, OUTPUT_BYTES // output))
    return [weights[i % len(weights)] for i in range(calls)]


def host_overheads() -> dict[str, float]:
    """Microseconds that one small call keeps the host: what a call costs before its kernel starts."""
    x, w = (torch.ones(16, 256, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    jax_x, jax_w = to_jax(x), to_jax(w)
    jitted = jax.jit(bi_jax.linear)
    return {
        "torch.mm": host_microseconds(lambda: torch.mm(x, w.t()), lambda _: torch.cuda.synchronize()),
        "bi_torch.mm": host_microseconds(lambda: bi_torch.mm(x, w.t()), lambda _: torch.cuda.synchronize()),
        "bi_torch.linear": host_microseconds(lambda: bi_torch.linear(x, w), lambda _: torch.cuda.synchronize()),
        "jax.jit(bi_jax.linear)": host_microseconds(lambda: jitted(jax_x, jax_w), jax.block_until_ready),
    }


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--dtype", choices=DTYPES, default="bfloat16")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="MODEL", help=", ".join(MODELS))
    parser.add_argument("--m", nargs="+", type=int, default=list(ROWS), metavar="M", help="rows in the batch")
    columns = [name for name in (*torch_columns(), JAX) if name != BASELINE]
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns, metavar="COLUMN", help=", ".join(columns))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the ratios against M")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not torch.cuda.is_available():
        console.print(
            "benchmarks.gemm compares GPU kernels and PyTorch sees no GPU; for the CPU run python -m benchmarks.gemm_cpu"
        )
        return 2
    torch.set_float32_matmul_precision("highest")

    facts = environment(args.dtype)
    console.print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", highlight=False)
    errors: list[Accuracy] = accuracy() if args.dtype == "float32" else []
    overheads = host_overheads()
    measurements = measure(args, console)
    for (n, k), label in shapes(args.models).items():
        console.print(measurement_table(f"{label} ({args.dtype})", [m for m in measurements if (m.n, m.k) == (n, k)], BASELINE))
    summaries = summarise(measurements, BASELINE)
    console.print(summary_table(summaries, BASELINE))
    if errors:
        console.print(accuracy_table(errors))
    console.print("host time of a call:", ", ".join(f"{name} {us:.1f} us" for name, us in overheads.items()))
    if args.json:
        extra = {"summary": [asdict(s) for s in summaries], "host_us": overheads, "accuracy": [asdict(e) for e in errors]}
        write_json(args.json, {**facts, "dtype": args.dtype}, measurements, extra)
    if args.plot:
        write_plot(
            args.plot, f"{args.dtype}, {facts['gpu']}, torch {facts['torch']}, jax {facts['jax']}", measurements, BASELINE
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
