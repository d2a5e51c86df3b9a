"""Row operations against PyTorch and against memory bandwidth: `python -m benchmarks.rows`.

Columns are torch eager, torch.compile, ours in PyTorch and ours in JAX. Inputs are shared between the frameworks without a
copy, and rotated so that no call finds its input in the L2 cache. In brackets: the bytes that an operation must move (every
input read once, every output written once) over the time, as a share of the rate of a large copy in the same run. Each
operation has a process of its own; they compile side by side and take turns on the GPU.
"""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# XLA's command buffers are CUDA graphs; as in a graph captured from a stream, one kernel runs after another.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_gpu_command_buffer_scheduling_mode=SERIALIZE"

import jax
import torch
import triton
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from benchmarks.row_operations import ALL, OPERATIONS, OTHERS
from benchmarks.timing import compiled_program, jax_compiled, microseconds, torch_program
from benchmarks.turns import in_turns, ready, turn
from bi_bridge import to_jax

SHAPES = ((16384, 4096), (8192, 8192), (4096, 16384), (2048, 151936), (65536, 128))
ONE_SHAPE = ((16384, 4096),)
"""Of the other operations."""
FEW_ROWS = ((1, 4096), (8, 4096), (64, 4096), (1, 151936), (8, 151936), (64, 151936))
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
EAGER, COMPILED, PYTORCH, JAX = "eager", "torch.compile", "bi_torch", "bi_jax"
L2_MULTIPLE = 4
"""The inputs of one program take at least this many times the L2 cache, or one call's do."""
MOST_INPUTS = 16
"""Different inputs of one program, at most."""
PROGRAM_BYTES = 1 << 30
"""A program makes as many calls as have inputs of this size together, ..."""
MOST_CALLS = 64
"""... but no more than this: the host takes longer to start a program than the device to run one short kernel."""


@dataclass(frozen=True)
class Measurement:
    """Microseconds per call of every column; `copy_us` is what a copy of as many bytes takes."""

    operation: str
    dtype: str
    rows: int
    cols: int
    copy_us: float
    microseconds: dict[str, float]


def copy_rate() -> float:
    """Bytes per microsecond, read and written, of a copy of 1 GiB: the driver's, or a kernel's if that is faster."""
    source, target = (torch.empty(1 << 28, device="cuda") for _ in range(2))
    source.normal_()
    copies = {"driver": target.copy_, "kernel": lambda x: torch.neg(x, out=target)}
    programs = {name: torch_program(copy, [(source,)]) for name, copy in copies.items()}
    return 2 * source.nbytes / min(microseconds(programs).values())


def measure_operation(
    name: str, dtype: str, shapes: Sequence[tuple[int, int]], columns: Sequence[str], rate: float
) -> list[Measurement]:
    """Every column for one operation and dtype; a process of its own runs this."""
    operation, itemsize = ALL[name], DTYPES[dtype].itemsize
    torch._dynamo.config.cache_size_limit = 64
    torch._inductor.config.compile_threads = 1  # there is a process for every operation
    calls = {EAGER: operation.eager, COMPILED: torch.compile(operation.eager, dynamic=False), PYTORCH: operation.ours}
    contenders = {column: calls[column] for column in calls if column in columns}

    def calls_of(rows: int, cols: int) -> tuple[int, int]:
        """Calls of a program, and how many of them have inputs of their own."""
        size = operation.elements * rows * cols * itemsize
        distinct = min(-(-L2_MULTIPLE * torch.cuda.get_device_properties().L2_cache_size // size), MOST_INPUTS)
        return max(distinct, min(PROGRAM_BYTES // size, MOST_CALLS)), distinct

    in_jax = {}
    for shape in shapes:
        inputs = operation.arguments(*shape, DTYPES[dtype])
        for column in contenders.keys() - {EAGER}:  # has nothing to compile, and takes the most memory
            contenders[column](*inputs)
        if JAX in columns:
            specs = tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in map(to_jax, inputs))
            in_jax[shape] = jax_compiled(operation.in_jax, [specs] * calls_of(*shape)[0])
        del inputs
        torch.cuda.empty_cache()
    ready()
    measurements = []
    for shape in shapes:
        with turn():
            count, distinct = calls_of(*shape)
            fresh = [operation.arguments(*shape, DTYPES[dtype]) for _ in range(distinct)]
            rotated = [fresh[i % distinct] for i in range(count)]
            programs = {column: torch_program(call, rotated) for column, call in contenders.items()}
            if JAX in columns:
                programs[JAX] = compiled_program(in_jax[shape], [tuple(map(to_jax, args)) for args in rotated])
            copy_us = operation.bytes(*shape, itemsize) / rate
            measurements.append(Measurement(name, dtype, *shape, copy_us, microseconds(programs)))
            del programs, fresh, rotated
            torch.cuda.empty_cache()
    return measurements


def table(measurements: Sequence[Measurement]) -> Table:
    """Microseconds and share of the copy's rate of every column, and how ours compares with the faster of torch's two."""
    columns = list(measurements[0].microseconds)
    result = Table(title="microseconds (share of the copy bandwidth)", title_justify="left")
    for name in ("operation", "dtype", "rows", "columns", *columns):
        result.add_column(name, justify="left" if name in ("operation", "dtype") else "right")
    for m in measurements:
        cells = [f"{us:.1f} ({m.copy_us / us:.2f})" for us in m.microseconds.values()]
        result.add_row(m.operation, m.dtype, str(m.rows), str(m.cols), *cells)
    return result


def write_plot(path: Path, measurements: Sequence[Measurement], title: str) -> None:
    """Share of the copy bandwidth: one panel an operation and dtype, a group of bars a shape."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    panels = list(dict.fromkeys((m.operation, m.dtype) for m in measurements))
    columns = list(measurements[0].microseconds)
    wide = min(2, len(panels))
    figure, axes = plt.subplots(-(-len(panels) // wide), wide, figsize=(7 * wide, 2.6 * -(-len(panels) // wide)),
                                layout="constrained", squeeze=False)  # fmt: skip
    for panel, ax in zip(panels, axes.flat, strict=False):
        inside = [m for m in measurements if (m.operation, m.dtype) == panel]
        for i, column in enumerate(columns):
            places = [j + 0.8 * (i + 0.5) / len(columns) - 0.4 for j in range(len(inside))]
            ax.bar(places, [m.copy_us / m.microseconds[column] for m in inside], 0.8 / len(columns), label=column)
        ax.axhline(1, color="black", linewidth=0.8)
        ax.set_xticks(range(len(inside)), [f"{m.rows}x{m.cols}" for m in inside], fontsize=7)
        ax.set_title(" ".join(panel), fontsize=9)
    axes[0, 0].legend(fontsize=7)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> int:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.rows", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument(
        "--ops", nargs="+", choices=ALL, default=list(OPERATIONS), metavar="OP", help=f"else {', '.join(OPERATIONS)}"
    )
    chosen.add_argument(
        "--others", action="store_const", dest="ops", const=list(OTHERS), help=f"{', '.join(OTHERS)}, which have one shape"
    )
    parser.add_argument("--dtypes", nargs="+", choices=DTYPES, default=list(DTYPES))
    parser.add_argument("--few", action="store_true", help="1 to 64 rows instead of many")
    columns = (EAGER, COMPILED, PYTORCH, JAX)
    parser.add_argument("--columns", nargs="+", choices=columns, default=columns, metavar="COLUMN", help=", ".join(columns))
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the measurements")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the shares of the copy bandwidth")
    args = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 160)
    if not torch.cuda.is_available():
        console.print("benchmarks.rows compares GPU kernels and PyTorch sees no GPU")
        return 2

    rate = copy_rate()
    facts = {
        "gpu": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__, "jax": jax.__version__,
        "copy": f"{rate / 1e6:.2f} TB/s",
    }  # fmt: skip
    console.print(*(f"{name}: {value}" for name, value in facts.items()), sep="\n", highlight=False)
    shapes = {op: FEW_ROWS if args.few else SHAPES if op in OPERATIONS else ONE_SHAPE for op in args.ops}
    calls = [(op, dtype, shapes[op], args.columns, rate) for op in args.ops for dtype in args.dtypes]
    bars = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    order = {(op, dtype): i for i, (op, dtype, *_) in enumerate(calls)}
    measurements: list[Measurement] = []
    with Progress(*bars, console=console, transient=True) as progress:
        for result in progress.track(in_turns(measure_operation, calls), total=len(calls), description="operations"):
            measurements = sorted([*measurements, *result], key=lambda m: order[m.operation, m.dtype])
            if args.json:  # what there is, in case that the rest does not come
                data = {"environment": facts, "measurements": [asdict(m) for m in measurements]}
                args.json.write_text(json.dumps(data, indent=1) + "\n")
    console.print(table(measurements))
    if args.plot:
        write_plot(args.plot, measurements, f"share of the copy bandwidth, {', '.join(facts.values())}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
