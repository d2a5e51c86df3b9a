"""A Llama of a billion parameters against stock PyTorch and stock JAX: `python -m benchmarks.model`.

In PyTorch the model is Hugging Face's, unmodified, under the mode; in JAX it is the decoder of `examples/llm`, see
`benchmarks.model_jax`. Both are in bfloat16 with random weights: a forward pass over 8 x 2048 tokens, and a decode step
beside a cache of 512 tokens at batch 1, 8 and 64. "graph" is a replayed CUDA graph, the device's own time; "eager" is what a
call takes with the host in the loop. Each is timed with attention and with a stub in its place that returns the query, in both
columns: what remains is the time of everything else. A second table tells how long one call of an op keeps the host.
"""

import argparse
import gc
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Any

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import torch
import torch.nn.functional as F
import transformers
import triton
from rich.console import Console
from rich.table import Table
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, AutoModelForCausalLM, DynamicCache, LlamaConfig

from benchmarks import model_jax
from benchmarks.model_report import CONFIG, CONTEXT, DECODE, FORWARD, LLAMA_1B, Measurement, table
from benchmarks.timing import host_microseconds, microseconds, torch_program
from bi_torch import set_batch_invariant_mode

STUB = "stub"
STOCK, OURS = "stock", "mode on"

Step = Callable[[], Tensor]


@dataclass(frozen=True)
class HostTime:
    """Microseconds for which one call of an op keeps the host."""

    op: str
    stock: float
    ours: float


def llama(sizes: dict[str, Any], device: str) -> Any:
    """The model in bfloat16, and the stub registered beside its attention."""
    AttentionInterface.register(STUB, _stub)
    AttentionMaskInterface.register(STUB, lambda *args, **kwargs: None)
    torch.manual_seed(0)
    with torch.device(device):
        return AutoModelForCausalLM.from_config(LlamaConfig(**sizes), dtype=torch.bfloat16).eval()


def _stub(module: Any, query: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, None]:
    return query.transpose(1, 2).contiguous(), None


def forward(model: Any, sequences: int, length: int) -> Step:
    """A pass over whole sequences."""
    ids = torch.randint(model.config.vocab_size, (sequences, length), device=model.device)
    return lambda: model(ids).logits


def decode(model: Any, sequences: int, context: int) -> Step:
    """One token beside a cache, which is as long as before when the step returns."""
    cache: Any = DynamicCache(config=model.config)
    model(torch.randint(model.config.vocab_size, (sequences, context), device=model.device), past_key_values=cache)
    filled = [(layer.keys, layer.values) for layer in cache.layers]
    ids = torch.randint(model.config.vocab_size, (sequences, 1), device=model.device)

    def step() -> Tensor:
        logits = model(ids, past_key_values=cache).logits
        for layer, (keys, values) in zip(cache.layers, filled, strict=True):
            layer.keys, layer.values = keys, values
        return logits

    return step


def cases(model: Any, forward_shape: tuple[int, int], batches: Sequence[int], context: int) -> Iterator[tuple[str, Step]]:
    """What is measured, by name."""
    yield f"forward {forward_shape[0]} x {forward_shape[1]}", forward(model, *forward_shape)
    for sequences in batches:
        yield f"decode step, batch {sequences}", decode(model, sequences, context)


@contextmanager
def attention(model: Any, implementation: str) -> Iterator[None]:
    """The model with another attention."""
    own = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(own)


def measure(model: Any) -> list[Measurement]:
    """Every case on a GPU."""
    measurements = []
    for case, step in cases(model, FORWARD, DECODE, CONTEXT):
        for part, implementation in (("all", "sdpa"), ("without attention", STUB)):
            programs, eager = {}, {}
            for column in (STOCK, OURS):
                with attention(model, implementation), set_batch_invariant_mode(column == OURS):
                    programs[column] = torch_program(step, [()])
                    eager[column] = _eager_milliseconds(step)
            graph = {column: us / 1e3 for column, us in microseconds(programs, repeats=3).items()}
            for how, columns in (("graph", graph), ("eager", eager)):
                measurements.append(Measurement(case, part, how, columns[STOCK], columns[OURS]))
            del programs
            torch.cuda.empty_cache()
    return measurements


def _eager_milliseconds(step: Step, *, calls: int = 5, repeats: int = 5) -> float:
    step()
    samples = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        torch.cuda.synchronize()
        samples.append((time.perf_counter() - start) / calls)
    return median(samples) * 1e3


def operations(device: str) -> dict[str, Callable[[], Tensor]]:
    """One call of each op on inputs so small that the host is what takes the time."""
    x, w = (torch.randn(16, 256, device=device, dtype=torch.bfloat16) for _ in range(2))
    column, batch, bias = x.t(), x.view(4, 4, 256), x.new_zeros(16)
    scale = x.new_ones(256)
    heads = x.view(1, 4, 16, 64)
    return {
        "linear": lambda: F.linear(x, w),
        "mm": lambda: torch.mm(x, column),
        "addmm": lambda: torch.addmm(bias, x, column),
        "bmm": lambda: torch.bmm(batch, batch.mT),
        "softmax": lambda: torch.softmax(x, -1),
        "log_softmax": lambda: torch.log_softmax(x, -1),
        "mean": lambda: x.mean(-1),
        "sum": lambda: x.sum(-1),
        "layer_norm": lambda: F.layer_norm(x, (256,), scale, scale),
        "rms_norm": lambda: F.rms_norm(x, (256,), scale),
        "gelu": lambda: F.gelu(x),
        "silu": lambda: F.silu(x),
        "scaled_dot_product_attention": lambda: F.scaled_dot_product_attention(heads, heads, heads, is_causal=True),
    }


def host_times() -> list[HostTime]:
    """Every op in both columns."""
    calls = operations("cuda")
    times: dict[str, dict[str, float]] = {}
    for column in (STOCK, OURS):
        with set_batch_invariant_mode(column == OURS):
            times[column] = {op: host_microseconds(call, lambda _: torch.cuda.synchronize()) for op, call in calls.items()}
    return [HostTime(op, times[STOCK][op], times[OURS][op]) for op in calls]


def host_table(times: Sequence[HostTime]) -> Table:
    """Microseconds of both columns, and what ours takes longer."""
    result = Table(title="microseconds of the host for one call", title_justify="left")
    for name in ("op", STOCK, OURS, "more"):
        result.add_column(name, justify="left" if name == "op" else "right")
    for t in times:
        result.add_row(t.op, f"{t.stock:.1f}", f"{t.ours:.1f}", f"{t.ours - t.stock:+.1f}")
    return result


@torch.no_grad()
def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model", description=__doc__)
    parser.add_argument("--only", choices=("torch", "jax"), help="measure one framework")
    parser.add_argument("--json", type=Path, help="write every number to this file")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("needs a GPU")
    console = Console(width=120)
    facts = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "transformers": transformers.__version__,
        "jax": jax.__version__,
    }
    console.print(facts, highlight=False)
    data: dict[str, Any] = {"environment": facts}
    if args.only != "jax":
        times = host_times()
        console.print(host_table(times))
        measurements = measure(llama(LLAMA_1B, "cuda"))
        console.print(table(measurements, "PyTorch, milliseconds", OURS))
        data |= {"measurements": list(map(asdict, measurements)), "host": list(map(asdict, times))}
        gc.collect()
        torch.cuda.empty_cache()
    if args.only != "torch":
        compilations, measurements = model_jax.measure(CONFIG)
        console.print(table(measurements, "JAX, milliseconds", "bi_jax"))
        console.print(table(compilations, "JAX, seconds to trace and compile", "bi_jax"))
        data |= {"jax": list(map(asdict, measurements)), "jax_compilation": list(map(asdict, compilations))}
    if args.json:
        args.json.write_text(json.dumps(data, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
