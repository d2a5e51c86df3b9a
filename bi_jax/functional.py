"""The names under which other batch-invariant libraries offer these operations, over the ops of this package.

Whoever used another library changes one import line. Results have the contracts' bits; their dtype is the input's unless
`dtype` says otherwise. JAX's arrays cannot be written to, so `out` must be None.
"""

import math
import threading
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bi_jax import gemm
from bi_jax.rows import norm, pointwise, reduce, softmax
from bi_jax.rows.arguments import FLOATS, Dims


def mm_batch_invariant(a: jax.Array, b: jax.Array, *, out: None = None) -> jax.Array:
    """a [M, K] @ b [K, N] -> [M, N]."""
    _check_out("mm_batch_invariant", out)
    return gemm.mm(a, b)


def bmm_batch_invariant(a: jax.Array, b: jax.Array, *, out: None = None) -> jax.Array:
    """a [B, M, K] @ b [B, K, N] -> [B, M, N]."""
    _check_out("bmm_batch_invariant", out)
    return gemm.bmm(a, b)


def addmm_batch_invariant(bias: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
    """Bias + a [M, K] @ b [K, N] -> [M, N], rounded once to the dtype of a."""
    return gemm.addmm(bias, a, b)


def matmul_persistent(a: jax.Array, b: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """a [M, K] @ b [K, N] + bias [N] -> [M, N], rounded once to the dtype of a."""
    return gemm.mm(a, b) if bias is None else gemm.addmm(bias, a, b)


def matmul_batch_invariant(a: jax.Array, b: jax.Array, *, out: None = None) -> jax.Array:
    """`matmul`: batch dimensions broadcast, 1-D operands are a row or a column."""
    _check_out("matmul_batch_invariant", out)
    return gemm.matmul(a, b)


def linear_batch_invariant(input: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """input [*, K] @ weight [N, K]^T + bias [N] -> [*, N]."""
    return gemm.linear(input, weight, bias)


def softmax_batch_invariant(input: jax.Array, dim: int, dtype: Any = None) -> jax.Array:
    """`softmax` over `dim`."""
    return softmax.softmax(input, dim, dtype)


def log_softmax_batch_invariant(input: jax.Array, dim: int) -> jax.Array:
    """`log_softmax` over `dim`."""
    return softmax.log_softmax(input, dim)


def log_softmax(input: jax.Array, dim: int = -1) -> jax.Array:
    """`log_softmax` over the last dimension by default."""
    return softmax.log_softmax(input, dim)


def mean_batch_invariant(input: jax.Array, dim: Dims, keepdim: bool = False, dtype: Any = None) -> jax.Array:
    """`mean` over `dim`; float32 for integers and bools where no dtype is given."""
    if dtype is None and isinstance(input, jax.Array | np.ndarray) and input.dtype.name not in FLOATS:
        dtype = jnp.float32
    return reduce.mean(input, dim, keepdim, dtype=dtype)


def mean_dim(input: jax.Array, dim: int, keepdim: bool = False, dtype: Any = None) -> jax.Array:
    """`mean_batch_invariant` over one dimension."""
    return mean_batch_invariant(input, dim, keepdim, dtype)


def gelu_batch_invariant(input: jax.Array) -> jax.Array:
    """`gelu`, by erf."""
    return pointwise.gelu(input)


def layer_norm_batch_invariant(
    input: jax.Array,
    normalized_shape: Sequence[int],
    weight: jax.Array | None = None,
    bias: jax.Array | None = None,
    eps: float = 1e-5,
) -> jax.Array:
    """`layer_norm` over the trailing dimensions `normalized_shape`."""
    return norm.layer_norm(input, normalized_shape, weight, bias, eps)


def rms_norm_batch_invariant(input: jax.Array, weight: jax.Array, eps: float = 1e-6) -> jax.Array:
    """`rms_norm` over the dimensions of `weight`."""
    return norm.rms_norm(input, weight.shape, weight, eps)


@dataclass
class OpStats:
    """What one operation of a `BatchInvariantOps` has done.

    Attributes:
        calls: of the method. Under `jax.jit` a call counts when it is traced, not each time it runs.
        rows: of the results, all dimensions but the last.
        elements: of the results.
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
        dtype: "bfloat16", "float16" or "float32", or what `jax.numpy.dtype` makes one of them.

    Raises:
        TypeError: another dtype.
    """

    def __init__(self, dtype: Any = jnp.bfloat16) -> None:
        self.dtype = jnp.dtype(dtype)
        if self.dtype.name not in FLOATS:
            raise TypeError(f"bi_jax.BatchInvariantOps: dtype must be one of {', '.join(FLOATS)}, got {self.dtype}")
        self._stats: dict[str, OpStats] = {}
        self._lock = threading.Lock()

    def mm(self, a: Any, b: Any, out: None = None) -> jax.Array:
        return self._counted("mm", mm_batch_invariant(self._floating(a), self._floating(b), out=out))

    def bmm(self, a: Any, b: Any, out: None = None) -> jax.Array:
        return self._counted("bmm", bmm_batch_invariant(self._floating(a), self._floating(b), out=out))

    def addmm(self, bias: Any, a: Any, b: Any) -> jax.Array:
        return self._counted("addmm", addmm_batch_invariant(*map(self._floating, (bias, a, b))))

    def matmul(self, a: Any, b: Any, bias: Any = None) -> jax.Array:
        """a [*, M, K] @ b [*, K, N], or with a bias [N], which is added before the one rounding, a [M, K] @ b [K, N]."""
        a, b = self._floating(a), self._floating(b)
        result = gemm.matmul(a, b) if bias is None else matmul_persistent(a, b, self._floating(bias))
        return self._counted("matmul", result)

    def softmax(self, input: Any, dim: int, dtype: Any = None) -> jax.Array:
        return self._counted("softmax", softmax_batch_invariant(self._floating(input), dim, dtype))

    def log_softmax(self, input: Any, dim: int = -1) -> jax.Array:
        return self._counted("log_softmax", log_softmax(self._floating(input), dim))

    def mean(self, input: Any, dim: Dims, keepdim: bool = False, dtype: Any = None) -> jax.Array:
        return self._counted("mean", mean_batch_invariant(self._floating(input), dim, keepdim, dtype))

    def gelu(self, input: Any) -> jax.Array:
        return self._counted("gelu", gelu_batch_invariant(self._floating(input)))

    def layer_norm(
        self, input: Any, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> jax.Array:
        weight, bias = (None if x is None else self._floating(x) for x in (weight, bias))
        result = layer_norm_batch_invariant(self._floating(input), normalized_shape, weight, bias, eps)
        return self._counted("layer_norm", result)

    def rms_norm(self, input: Any, weight: Any, eps: float = 1e-6) -> jax.Array:
        return self._counted("rms_norm", rms_norm_batch_invariant(self._floating(input), self._floating(weight), eps))

    def get_stats(self) -> dict[str, dict[str, int]]:
        """Calls, rows and elements of every op that was called, by its name."""
        with self._lock:
            return {name: asdict(stats) for name, stats in self._stats.items()}

    def reset_stats(self) -> None:
        """Count from 0 again."""
        with self._lock:
            self._stats.clear()

    def _floating(self, x: Any) -> jax.Array:
        x = x if isinstance(x, jax.Array) else np.asarray(x)
        return jnp.asarray(x, None if x.dtype.name in FLOATS else self.dtype)

    def _counted(self, name: str, result: jax.Array) -> jax.Array:
        with self._lock:
            stats = self._stats.setdefault(name, OpStats())
            stats.calls += 1
            stats.rows += math.prod(result.shape[:-1]) if result.size else 0
            stats.elements += result.size
        return result


def _check_out(name: str, out: Any) -> None:
    if out is not None:
        raise TypeError(f"bi_jax.{name}: out must be None, JAX's arrays cannot be written to; got {type(out).__name__}")
