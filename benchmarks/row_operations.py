"""The row operations that benchmarks measure: how torch, bi_torch and bi_jax call each of them on the same inputs."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

import bi_jax
import bi_torch

HEAD = 128
"""Elements that a rotary embedding turns by the same angles."""
STEP = 10
"""Of an optimizer."""


@dataclass(frozen=True)
class Operation:
    """One operation: how torch, bi_torch and bi_jax call it on its inputs.

    Attributes:
        eager, ours, in_jax: called with the elements, then the ids, the columns and the tables.
        columns: inputs [cols].
        elements: inputs [rows, cols].
        ids: one int32 input [rows], a column for each row.
        tables: cosines and sines, float32 [rows, 1, HEAD / 2].
        writes: outputs [rows, cols].
    """

    eager: Callable[..., Any]
    ours: Callable[..., Any]
    in_jax: Callable[..., Any]
    columns: int = 0
    elements: int = 1
    ids: bool = False
    tables: bool = False
    writes: int = 1

    def arguments(self, rows: int, cols: int, dtype: torch.dtype, device: str = "cuda") -> tuple[torch.Tensor, ...]:
        """Fresh inputs: elements [rows, cols], ids [rows], parameters [cols], then tables."""
        elements = [torch.empty(rows, cols, device=device, dtype=dtype).normal_() for _ in range(self.elements)]
        ids = [torch.randint(cols, (rows,), device=device, dtype=torch.int32)] if self.ids else []
        parameters = [torch.empty(cols, device=device, dtype=dtype).normal_() for _ in range(self.columns)]
        tables = [torch.empty(rows, 1, HEAD // 2, device=device).uniform_(-1, 1) for _ in range(2 * self.tables)]
        return (*elements, *ids, *parameters, *tables)

    def bytes(self, rows: int, cols: int, itemsize: int) -> int:
        """Bytes of the large tensors, each counted once."""
        return (self.elements + self.writes) * rows * cols * itemsize


def _token_logprobs(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(logits, -1, dtype=torch.float32).gather(-1, ids.long()[:, None])[:, 0]


def _fused_add_rms_norm(x: torch.Tensor, residual: torch.Tensor, weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    h = x + residual
    return F.rms_norm(h, h.shape[-1:], weight, 1e-6), h


def _rotary_embedding(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    first, second = x.unflatten(-1, (-1, HEAD)).float().chunk(2, -1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], -1).to(x.dtype)


def _sgd(p: torch.Tensor, g: torch.Tensor, buffer: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    buffer = 0.9 * buffer + g
    return p - 0.1 * buffer, buffer


def _adamw(p: torch.Tensor, g: torch.Tensor, m: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, ...]:
    m, v = m.lerp(g, 0.1), 0.999 * v + 0.001 * g * g
    update = m / (1 - 0.9**STEP) / ((v / (1 - 0.999**STEP)).sqrt() + 1e-8)
    return p - 1e-3 * (update + 0.01 * p), m, v


def _clip(g: torch.Tensor) -> torch.Tensor:
    return g * (1 / (torch.linalg.vector_norm(g, dtype=torch.float32) + 1e-6)).clamp(max=1)


def _over_columns(name: str, writes: int = 0) -> Operation:
    eager, ours, in_jax = (getattr(module, name) for module in (torch, bi_torch, bi_jax))
    return Operation(lambda x: eager(x, -1), lambda x: ours(x, -1), lambda x: in_jax(x, -1), writes=writes)


def _of_elements(name: str) -> Operation:
    return Operation(getattr(torch, name), getattr(bi_torch, name), getattr(bi_jax, name))


OPERATIONS: dict[str, Operation] = {
    "softmax": _over_columns("softmax", writes=1),
    "log_softmax": _over_columns("log_softmax", writes=1),
    "token_logprobs": Operation(
        _token_logprobs, bi_torch.token_logprobs, bi_jax.token_logprobs, ids=True, writes=0
    ),
    "logsumexp": _over_columns("logsumexp"),
    "sum": _over_columns("sum"),
    "rms_norm": Operation(
        lambda x, w: F.rms_norm(x, x.shape[-1:], w, 1e-6),
        lambda x, w: bi_torch.rms_norm(x, x.shape[-1:], w, 1e-6),
        lambda x, w: bi_jax.rms_norm(x, x.shape[-1:], w, 1e-6),
        columns=1,
    ),
    "fused_add_rms_norm": Operation(
        _fused_add_rms_norm,
        lambda x, r, w: bi_torch.fused_add_rms_norm(x, r, w, 1e-6),
        lambda x, r, w: bi_jax.fused_add_rms_norm(x, r, w, 1e-6),
        columns=1, elements=2, writes=2,
    ),
    "layer_norm": Operation(
        lambda x, w, b: F.layer_norm(x, x.shape[-1:], w, b),
        lambda x, w, b: bi_torch.layer_norm(x, x.shape[-1:], w, b),
        lambda x, w, b: bi_jax.layer_norm(x, x.shape[-1:], w, b),
        columns=2,
    ),
    "gelu": Operation(F.gelu, bi_torch.gelu, bi_jax.gelu),
    "silu_mul": Operation(lambda x, up: F.silu(x) * up, bi_torch.silu_mul, bi_jax.silu_mul, elements=2),
    "exp": _of_elements("exp"),
}  # fmt: skip
"""What models spend their time on."""

OTHERS: dict[str, Operation] = {
    **{name: _over_columns(name) for name in ("mean", "var", "amax", "amin")},
    "cross_entropy": Operation(
        lambda x, ids: F.cross_entropy(x, ids.long(), reduction="none"),
        lambda x, ids: bi_torch.cross_entropy(x, ids, reduction="none"),
        lambda x, ids: bi_jax.cross_entropy(x, ids, reduction="none"),
        ids=True, writes=0,
    ),
    "silu": Operation(F.silu, bi_torch.silu, bi_jax.silu),
    **{name: _of_elements(name) for name in ("sigmoid", "tanh", "log", "erf", "rsqrt", "sin", "cos")},
    "rotary_embedding": Operation(
        _rotary_embedding,
        lambda x, cos, sin: bi_torch.rotary_embedding(x.unflatten(-1, (-1, HEAD)), cos, sin),
        lambda x, cos, sin: bi_jax.rotary_embedding(x.reshape(len(x), -1, HEAD), cos, sin),
        tables=True,
    ),
    "sgd": Operation(
        _sgd,
        lambda p, g, buffer: bi_torch.sgd(p, g, buffer, lr=0.1, momentum=0.9),
        lambda p, g, buffer: bi_jax.sgd(p, g, buffer, lr=0.1, momentum=0.9),
        elements=3, writes=2,
    ),
    "adamw": Operation(
        _adamw,
        lambda p, g, m, v: bi_torch.adamw(p, g, m, v, STEP),
        lambda p, g, m, v: bi_jax.adamw(p, g, m, v, STEP),
        elements=4, writes=3,
    ),
    "clip_by_global_norm": Operation(
        _clip, lambda g: bi_torch.clip_by_global_norm([g], 1.0)[0][0], lambda g: bi_jax.clip_by_global_norm([g], 1.0)[0][0]
    ),
}  # fmt: skip
"""The other operations, but for `embedding`, whose rows the frameworks themselves copy."""

ALL = OPERATIONS | OTHERS
