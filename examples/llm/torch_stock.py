"""PyTorch's own operations under the names that the model uses: what a user has without this library."""

import torch
import torch.nn.functional as F
from torch import Tensor

embedding, log_softmax, cross_entropy = F.embedding, F.log_softmax, F.cross_entropy
scaled_dot_product_attention = F.scaled_dot_product_attention


def linear(input: Tensor, weight: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
    """input @ weight^T; a wider result is a conversion."""
    y = F.linear(input, weight)
    return y if out_dtype is None else y.to(out_dtype)


def rotary_tables(positions: Tensor, head_dim: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines [T, head_dim / 2]."""
    frequencies = theta ** (-torch.arange(0, head_dim, 2, device=positions.device) / head_dim)
    angles = positions[:, None] * frequencies
    return angles.cos(), angles.sin()


def rotary_embedding(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Element i and element i + head_dim / 2 turned."""
    a, b = x.float().chunk(2, dim=-1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


def fused_add_rms_norm(input: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(h), h) with h = input + residual."""
    h = input + residual
    return F.rms_norm(h, h.shape[-1:], weight, eps), h


def silu_mul(gate: Tensor, up: Tensor) -> Tensor:
    """The gated MLP."""
    return F.silu(gate) * up
