"""Launches the Triton kernels of attention. What depends on shapes, strides and dtypes alone is decided once and kept."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bi_torch.attention import triton_kernels
from bi_torch.device import bind_context, new_tensor
from bi_torch.direct import keep, signature
from bi_torch.rows.cuda import Launch

_TILE = 4096
"""Elements that a program works on at a time."""
_MOST_PARTS = 64
"""Parts of the keys, each with a program for every block of columns."""


@dataclass(frozen=True)
class Take:
    """Keys or values [N, K, D] copied; the outputs of `triton_kernels.take`.

    Attributes:
        first: the shape of `first`, if what is not finite is to be 0.
        rows: how many rows the causal lengths are asked of, or 0.
    """

    launch: Launch
    shape: tuple[int, ...]
    first: tuple[int, ...] | None
    rows: int

    @staticmethod
    def of(x: Tensor, order: Tensor | None, *, finite: bool, causal: tuple[int, int] | None = None) -> "Take":
        """Of all x with the signature of this one; `order` is int32 [N, K], contiguous; `causal`: rows and queries."""
        n, keys, d = x.shape
        block_d = min(128, triton.next_power_of_2(d))
        block_k = _TILE // block_d
        span = triton.cdiv(triton.cdiv(keys, _MOST_PARTS), block_k) * block_k
        parts = triton.cdiv(keys, span)
        rows, queries = causal or (0, 1)
        tail = (
            *x.stride(), d, keys, parts, span, rows, queries, order is not None, finite, causal is not None, block_k, block_d,
        )  # fmt: skip
        programs = n * parts * triton.cdiv(d, block_d)
        launch = Launch(triton_kernels.take, programs, lambda call: (*call, *tail), 4)
        return Take(launch, (n, keys, d), (n, parts, d) if finite else None, rows)

    def __call__(self, device: int, x: Tensor, order: Tensor | None = None) -> tuple[Tensor, Any, Any]:
        """The copy, `first` and the lengths, as far as they are asked for; `device` is the current one."""
        y = new_tensor(self.shape, x.dtype, x.device)
        first = None if self.first is None else new_tensor(self.first, torch.int32, x.device)
        lengths = new_tensor((self.rows,), torch.int32, x.device) if self.rows else None
        self.launch(device, (x, order, y, first, lengths))
        return y, first, lengths


@dataclass(frozen=True)
class Settle:
    """Outputs [N, R, D] made NaN where they must be; see `triton_kernels.settle`."""

    launch: Launch

    @staticmethod
    def of(shape: tuple[int, ...], parts: int) -> "Settle":
        """Of outputs of this shape, and of tensors of one dtype, device and alignment."""
        entries, rows, d = shape
        block_d = min(128, triton.next_power_of_2(d))
        block_r = _TILE // block_d
        tail = (d, rows, parts, triton.next_power_of_2(parts), block_r, block_d)
        programs = entries * triton.cdiv(rows, block_r) * triton.cdiv(d, block_d)
        return Settle(Launch(triton_kernels.settle, programs, lambda call: (*call, *tail), 4))

    def __call__(self, device: int, y: Tensor, first: Tensor, lengths: Tensor) -> None:
        """Change y; all are contiguous, and `device` is the current one."""
        self.launch(device, (y, first, lengths))


_PLANS: dict[Any, Any] = {}


def _kept(key: Any, make: Callable[[], Any]) -> Any:
    """What `make` returns, once a key."""
    plan = _PLANS.get(key)
    if plan is None:
        plan = keep(_PLANS, key, make())
    return plan


def values(x: Tensor) -> tuple[Tensor, Tensor]:
    """x [N, K, D] with 0 for what is not finite, and where each column has it first, int32 [N, parts, D]."""
    if not x.numel():
        return torch.empty_like(x), x.new_empty((x.shape[0], 1, x.shape[2]), dtype=torch.int32)
    take = _kept(signature(x), lambda: Take.of(x, None, finite=True))
    bind_context()
    with torch.cuda.device_of(x):
        y, first, _ = take(x.get_device(), x)
    return y, first


def settle(y: Tensor, first: Tensor, lengths: Tensor) -> Tensor:
    """y [N, R, D], contiguous, with NaN where it is not finite and where `first` is less than the row's length [N, R]."""
    if y.numel():
        first, lengths = first.contiguous(), lengths.contiguous()
        key = signature(y), signature(first), signature(lengths)
        plan = _kept(key, lambda: Settle.of(tuple(y.shape), first.shape[1]))
        bind_context()
        with torch.cuda.device_of(y):
            plan(y.get_device(), y, first, lengths)
    return y
