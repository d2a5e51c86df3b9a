"""Does a row's output depend on the batch it is computed in? `python -m examples.batch_invariance`.

The input is the last step of a feed-forward block with the sizes of Llama-3-8B: 64 token vectors of 14336 gated activations
go through the down projection (a slice of its outputs on a CPU). Each library multiplies the whole batch at once, then one
token at a time, and the table counts the outputs whose bits differ. The stock matmul picks another algorithm for another
batch; the contract leaves no such choice.
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

Linear = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def feed_forward_input(outputs: int, device: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Gated activations [tokens, hidden] and a weight [outputs, hidden], the same on every machine."""
    generator = torch.Generator().manual_seed(0)
    gate, up = torch.randn(2, TOKENS, HIDDEN, generator=generator)
    weight = torch.randn(outputs, HIDDEN, generator=generator) * HIDDEN**-0.5
    activations = torch.nn.functional.silu(gate) * up
    return activations.bfloat16().to(device), weight.bfloat16().to(device)


def jax_linear() -> Linear:
    """bi_jax.linear under jit, on tensors: the bridge shares their memory."""
    jitted = jax.jit(bi_jax.linear)
    return lambda x, weight: to_torch(jitted(to_jax(x), to_jax(weight)))


def differing(one: torch.Tensor, other: torch.Tensor) -> int:
    """Outputs whose bits differ."""
    return int((one.view(torch.int16) != other.view(torch.int16)).sum())


def main() -> int:
    """Multiply, compare, print; 1 if an output of this library depends on the batch or on the framework."""
    on_gpu = torch.cuda.is_available()
    x, weight = feed_forward_input(FEATURES if on_gpu else 256, "cuda" if on_gpu else "cpu")
    libraries: dict[str, Linear] = {
        "torch.nn.functional.linear": torch.nn.functional.linear,
        "bi_torch.linear": bi_torch.linear,
        "bi_jax.linear": jax_linear(),
    }
    console = Console()
    where = torch.cuda.get_device_name() if on_gpu else "a CPU"
    console.print(f"{TOKENS} tokens x {list(weight.shape)} weight, bfloat16, on {where}", highlight=False)
    batch, alone = {}, {}
    for name, linear in libraries.items():
        with console.status(name):
            batch[name] = linear(x, weight)
            alone[name] = torch.cat([linear(x[i : i + 1], weight) for i in range(TOKENS)])

    table = Table()
    table.add_column("matmul")
    table.add_column(f"batch of 1 against batch of {TOKENS}", justify="right")
    table.add_column("bi_torch against this", justify="right")
    for name in libraries:
        between = differing(batch["bi_torch.linear"], batch[name])
        table.add_row(name, f"{differing(batch[name], alone[name]):,} of {x.shape[0] * len(weight):,}", f"{between:,}")
    console.print(
        table, "Outputs whose bits differ. Both bi_ libraries follow", gemm_contract("bfloat16").contract_id, sep="\n"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
