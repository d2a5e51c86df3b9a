"""The names that other batch-invariant libraries have, for those who change one import line: thin over the ops of `bi_torch`.

Arguments are bfloat16, float16 or float32; arithmetic is float32 inside, and a result is rounded once, to the input's dtype
unless `dtype` says otherwise. Errors are those of the ops.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

import bi_torch
from bi_torch.rows.arguments import FLOATS
from bi_torch.rows.reduce import INTEGERS

__all__ = [
    "BatchInvariantOps",
    "addmm_batch_invariant",
    "bmm_batch_invariant",
    "gelu_batch_invariant",
    "layer_norm_batch_invariant",
    "linear_batch_invariant",
    "log_softmax",
    "log_softmax_batch_invariant",
    "matmul_batch_invariant",
    "matmul_persistent",
    "mean_batch_invariant",
    "mean_dim",
    "mm_batch_invariant",
    "rms_norm_batch_invariant",
    "softmax_batch_invariant",
]

Dims = int | Sequence[int] | None


def matmul_persistent(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] + bias [N] -> [M, N], rounded once."""
    return bi_torch.mm(a, b) if bias is None else bi_torch.addmm(bias, a, b)


def mm_batch_invariant(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a [M, K] @ b [K, N] -> [M, N]."""
    return bi_torch.mm(a, b, out=out)


def bmm_batch_invariant(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N]."""
    return bi_torch.bmm(a, b, out=out)


def addmm_batch_invariant(bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """bias + a [M, K] @ b [K, N] -> [M, N], rounded once; the bias broadcasts."""
    return bi_torch.addmm(bias, a, b)


def matmul_batch_invariant(a: Tensor, b: Tensor, *, out: Tensor | None = None) -> Tensor:
    """torch.matmul of any dimensions."""
    return bi_torch.matmul(a, b, out=out)


def linear_batch_invariant(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """input [*, K] @ weight [N, K]^T + bias [N] -> [*, N], rounded once."""
    return bi_torch.linear(input, weight, bias)


def softmax_batch_invariant(input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
    """softmax over `dim`."""
    return bi_torch.softmax(input, dim, dtype)


def log_softmax_batch_invariant(input: Tensor, dim: int) -> Tensor:
    """log_softmax over `dim`."""
    return bi_torch.log_softmax(input, dim)


def log_softmax(input: Tensor, dim: int = -1) -> Tensor:
    """log_softmax over `dim`, the last one by default."""
    return bi_torch.log_softmax(input, dim)


def mean_batch_invariant(input: Tensor, dim: Dims, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """The mean over `dim`; float32 for integers and bools where no dtype is given."""
    if dtype is None and input.dtype in INTEGERS:
        dtype = torch.float32
    return bi_torch.mean(input, dim, keepdim, dtype=dtype)


def mean_dim(input: Tensor, dim: int, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
    """`mean_batch_invariant` over one dimension."""
    return mean_batch_invariant(input, dim, keepdim, dtype)


def gelu_batch_invariant(input: Tensor) -> Tensor:
    """gelu by erf."""
    return bi_torch.gelu(input)


def layer_norm_batch_invariant(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """layer_norm over the trailing dimensions."""
    return bi_torch.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm_batch_invariant(input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """rms_norm over the dimensions of `weight`, the last ones."""
    return bi_torch.rms_norm(input, weight.shape, weight, eps)


@dataclass
class OpStats:
    """What was asked of one op.

    Attributes:
        calls: how often.
        rows: rows of the results: all their dimensions but the last.
        elements: elements of the results.
    """

    calls: int = 0
    rows: int = 0
    elements: int = 0


class BatchInvariantOps:
    """The functions above as methods that count their calls.

    Precision follows from the inputs: bfloat16 and float16 run on tensor cores, are accumulated in float32 and rounded once
    to their dtype; float32 has IEEE quality, never TF32. Inputs that are neither (integers, bools, float64) are converted to
    `dtype` first. Counting is safe with several threads.

    Args:
        device: where inputs must be; None for anywhere.
        dtype: bfloat16, float16 or float32.

    Raises:
        TypeError: another dtype.
    """

    def __init__(self, device: torch.device | str | None = None, dtype: torch.dtype = torch.bfloat16) -> None:
        if dtype not in FLOATS:
            raise TypeError(f"BatchInvariantOps: dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
        self.device = None if device is None else torch.device(device)
        self.dtype = dtype
        self._stats: dict[str, OpStats] = {}
        self._lock = threading.Lock()

    def matmul(self, a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
        """a @ b, as torch.matmul; with a bias, two matrices and one rounding."""
        if bias is None:
            return self._count("matmul", matmul_batch_invariant, a, b)
        return self._count("matmul", matmul_persistent, a, b, bias)

    def softmax(self, input: Tensor, dim: int, dtype: torch.dtype | None = None) -> Tensor:
        """softmax over `dim`."""
        return self._count("softmax", softmax_batch_invariant, input, dim, dtype)

    def log_softmax(self, input: Tensor, dim: int = -1) -> Tensor:
        """log_softmax over `dim`."""
        return self._count("log_softmax", log_softmax_batch_invariant, input, dim)

    def mean(self, input: Tensor, dim: Dims, keepdim: bool = False, dtype: torch.dtype | None = None) -> Tensor:
        """The mean over `dim`."""
        return self._count("mean", mean_batch_invariant, input, dim, keepdim, dtype)

    def mm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a [M, K] @ b [K, N] -> [M, N]."""
        return self._count("mm", mm_batch_invariant, a, b, out=out)

    def bmm(self, a: Tensor, b: Tensor, out: Tensor | None = None) -> Tensor:
        """a [B, M, K] @ b [B, K, N] -> [B, M, N]."""
        return self._count("bmm", bmm_batch_invariant, a, b, out=out)

    def addmm(self, bias: Tensor, a: Tensor, b: Tensor) -> Tensor:
        """bias + a [M, K] @ b [K, N] -> [M, N]."""
        return self._count("addmm", addmm_batch_invariant, bias, a, b)

    def gelu(self, input: Tensor) -> Tensor:
        """gelu by erf."""
        return self._count("gelu", gelu_batch_invariant, input)

    def layer_norm(
        self,
        input: Tensor,
        normalized_shape: Sequence[int],
        weight: Tensor | None = None,
        bias: Tensor | None = None,
        eps: float = 1e-5,
    ) -> Tensor:
        """layer_norm over the trailing dimensions."""
        return self._count("layer_norm", layer_norm_batch_invariant, input, normalized_shape, weight, bias, eps)

    def rms_norm(self, input: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
        """rms_norm over the dimensions of `weight`, the last ones."""
        return self._count("rms_norm", rms_norm_batch_invariant, input, weight, eps)

    def get_stats(self) -> dict[str, dict[str, int]]:
        """Calls, rows and elements of every op that was called, by its name."""
        with self._lock:
            return {op: asdict(stats) for op, stats in self._stats.items()}

    def reset_stats(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._stats.clear()

    def _count(self, op: str, function: Callable[..., Tensor], *args: Any, **kwargs: Any) -> Tensor:
        """function(*args, **kwargs), on tensors where they must be and of a dtype that the ops take.

        Raises:
            RuntimeError: a tensor is on another device.
        """
        result = function(*(self._placed(op, x) if isinstance(x, Tensor) else x for x in args), **kwargs)
        columns = result.shape[-1] if result.dim() else 1
        with self._lock:
            stats = self._stats.setdefault(op, OpStats())
            stats.calls += 1
            stats.rows += result.numel() // columns if columns else 0
            stats.elements += result.numel()
        return result

    def _placed(self, op: str, x: Tensor) -> Tensor:
        if self.device is not None and (self.device.type != x.device.type or self.device.index not in (None, x.device.index)):
            raise RuntimeError(f"BatchInvariantOps.{op}: tensors must be on {self.device}, got {x.device}")
        return x if x.dtype in FLOATS else x.to(self.dtype)
