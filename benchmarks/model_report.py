"""What is measured of a model, in either framework, and the tables."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rich.table import Table

from examples.llm.config import Config

CONFIG = Config(
    layers=16, width=2048, heads=32, kv_heads=8, head_dim=64, hidden=8192, tied=True, vocab=128256, theta=500000.0
)  # fmt: skip
"""The sizes of Llama-3.2-1B."""
LLAMA_1B: dict[str, Any] = {
    "vocab_size": CONFIG.vocab, "hidden_size": CONFIG.width, "intermediate_size": CONFIG.hidden,
    "num_hidden_layers": CONFIG.layers, "num_attention_heads": CONFIG.heads, "num_key_value_heads": CONFIG.kv_heads,
    "head_dim": CONFIG.head_dim,
}  # fmt: skip
"""The same, as Hugging Face's configuration names them."""
FORWARD = (8, 2048)
"""Sequences and tokens of a forward pass."""
CONTEXT = 512
"""Tokens in the cache beside which a step decodes."""
DECODE = (1, 8, 64)
"""Batches of a decode step."""


@dataclass(frozen=True)
class Measurement:
    """Milliseconds of one call, or seconds of its compilation, in both columns.

    Attributes:
        case: what is computed.
        part: "all", or "without attention".
        how: "graph", "eager" or "jit".
        stock: with the framework's own operations.
        ours: with this library's.
    """

    case: str
    part: str
    how: str
    stock: float
    ours: float


def table(measurements: Sequence[Measurement], title: str, ours: str) -> Table:
    """Both columns, and ours relative to stock."""
    result = Table(title=title, title_justify="left")
    for name in ("case", "part", "timed", "stock", ours, f"{ours} / stock"):
        result.add_column(name, justify="left" if name in ("case", "part", "timed") else "right")
    for i, m in enumerate(measurements):
        if i and measurements[i - 1].case != m.case:
            result.add_section()
        result.add_row(m.case, m.part, m.how, f"{m.stock:.3f}", f"{m.ours:.3f}", f"{m.ours / m.stock:.2f}")
    return result
