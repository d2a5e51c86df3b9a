"""Does a row's output depend on the batch it is computed in? `python -m examples.batch_invariance`.

The input is the last step of a feed-forward block with the sizes of Llama-3-8B: 64 token vectors of 14336 gated activations
go through the down projection (some of its outputs on a CPU, all of them on a GPU). Each library multiplies the whole batch
at once, then one token at a time, and the table counts the outputs whose bits differ. A stock matmul picks another
algorithm for another batch; the contract leaves no such choice. The float32 rows hold the same bfloat16 values.
"""

import os
import sys
from collections.abc import Callable

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")

import jax
import torch
from rich.console import Console
from rich.table import Table

import bi_jax
import bi_torch
from bi_bridge import to_jax, to_torch
from shared_specs import gemm_contract

TOKENS, HIDDEN, FEATURES = 64, 14336, 4096
CPU_FEATURES = {"bfloat16": 512, "float32": 16}

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feed_forward_input() -> tuple[torch.Tensor, torch.Tensor]:
    """Gated activations [tokens, hidden] and a weight [features, hidden] in bfloat16, the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(FEATURES, HIDDEN, generator=generator) * HIDDEN**-0.5
    return (torch.nn.functional.silu(gate) * up).bfloat16(), weight.bfloat16()


def jax_linear() -> Linear:
    """bi_jax.linear under jit, on tensors: the bridge shares their memory."""
    jitted = jax.jit(bi_jax.linear)
    return lambda x, weight: to_torch(jitted(to_jax(x), to_jax(weight)))


LIBRARIES: dict[str, Linear] = {
    "torch (stock)": torch.nn.functional.linear,
    "bi_torch": bi_torch.linear,
    "bi_jax": jax_linear(),
}


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """Outputs whose bits differ."""
    bits = {2: torch.int16, 4: torch.int32}[one.itemsize]
    return int((one.view(bits) != other.view(bits)).sum())


def main() -> int:
    """Multiply, compare, print; 1 if an output of this library depends on the batch or on the framework."""
    on_gpu = torch.cuda.is_available()
    device = "cuda" if on_gpu else "cpu"
    console = Console()
    console.print(
        f"{TOKENS} tokens of {HIDDEN} activations on {torch.cuda.get_device_name() if on_gpu else 'a CPU'}", highlight=False
    )
    table = Table(caption="outputs whose bits differ", caption_justify="right")
    for name in ("dtype", "linear", f"batch of 1 against {TOKENS}", "bi_torch against bi_jax"):
        table.add_column(name, justify="left" if name in ("dtype", "linear") else "right")

    x, weight = feed_forward_input()
    broken = 0
    for dtype, cpu_features in CPU_FEATURES.items():
        tokens, matrix = (t.to(device, getattr(torch, dtype)) for t in (x, weight if on_gpu else weight[:cpu_features]))
        batch = {}
        rows = []
        for name, linear in LIBRARIES.items():
            with console.status(f"{name}, {dtype}"):
                batch[name] = linear(tokens, matrix)
                alone = torch.cat([linear(tokens[i : i + 1], matrix) for i in range(TOKENS)])
            rows.append((name, differing(batch[name], alone)))
        between = differing(batch["bi_torch"], batch["bi_jax"])
        total = TOKENS * len(matrix)
        for name, count in rows:
            ours = name.startswith("bi_")
            broken += (count + between) if ours else 0
            table.add_row(dtype, name, f"{count:,} of {total:,}", f"{between:,} of {total:,}" if ours else "")
        table.add_section()
    console.print(table)
    console.print("contract:", gemm_contract("bfloat16").contract_id, highlight=False, soft_wrap=True)
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
