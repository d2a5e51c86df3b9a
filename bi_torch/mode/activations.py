"""Elementwise functions that depend on where an element stands, and those that another framework must be able to match.

On a CPU torch computes most elements of some functions with vector instructions and the rest one by one, by another program.
For sigmoid, silu, gelu and rsqrt the contract has a program, which takes their place there; `portable=True` puts the contract's
programs in place of all functions that it has, on both devices. For the others every element goes through the vector
instructions: `aligned` hands torch's kernel whole vectors. On a GPU the same is so for the division of lists of tensors.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from bi_torch.mode.override import Function, Override, overload
from bi_torch.rows import elementary, pointwise
from bi_torch.rows.arguments import FLOATS
from bi_torch.rows.reduce import INTEGERS
from bi_torch.stock import stock_kernels

VECTORS = 64
"""Elements that any vector loop of torch's CPU kernels takes at a time: two registers of 512 bits of 16-bit numbers."""

PIECE = 1 << 14
"""Elements of a call; with fewer than 2^15, torch does not divide them among threads, at places that depend on their number."""


def _unary(function: Callable[..., Tensor]) -> Function:
    """An elementwise function; integers and bools are float32 first, as far as torch's default dtype is that."""

    def run(self: Tensor, **options: Any) -> Any:
        if self.dtype in FLOATS:
            return in_order(lambda x: function(x, **options), self)
        if self.dtype in INTEGERS and torch.get_default_dtype() in FLOATS:
            return in_order(lambda x: function(x, **options), self.to(torch.get_default_dtype()))
        return NotImplemented

    return run


def glu(self: Tensor, dim: int = -1) -> Any:
    """The first half times the sigmoid of the second, in float32."""
    if self.dtype not in FLOATS or not self.dim() or self.shape[dim] % 2:
        return NotImplemented
    x, gate = self.to(torch.float32).chunk(2, dim)
    return (x * pointwise.sigmoid(gate)).to(self.dtype)


def _gradient(function: Callable[..., Tensor]) -> Function:
    def run(grad_output: Tensor, self: Tensor, **options: Any) -> Any:
        return function(grad_output, self, **options) if self.dtype in FLOATS else NotImplemented

    return run


def in_order(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """function(x), with the strides of x where its elements are dense in another order of dimensions."""
    if x.is_contiguous():
        return function(x)
    strides = x.stride()
    order = sorted(range(x.dim()), key=lambda d: -strides[d])
    permuted = x.permute(order)
    if not permuted.is_contiguous():
        return function(x)
    return function(permuted).permute([order.index(d) for d in range(x.dim())])


def aligned(name: str) -> Function:
    """Torch's own kernel of an elementwise op, for whole vectors and on one thread: every element takes the same path."""
    op = overload(name)

    def run(*args: Any, **kwargs: Any) -> Tensor:
        leaves, tree = pytree.tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        # A number in a tensor promotes dtypes as a number does, unless there is nothing else.
        places = [i for i in places if leaves[i].dim()] or places
        shape = torch.broadcast_shapes(*(leaves[i].shape for i in places))
        count = math.prod(shape)
        flat = {i: _padded(leaves[i].broadcast_to(shape).reshape(count)) for i in places}
        results = []
        with stock_kernels():
            for lo in range(0, max(1, count), PIECE):
                piece = [flat[i][lo : lo + PIECE] if i in flat else leaf for i, leaf in enumerate(leaves)]
                args, kwargs = pytree.tree_unflatten(piece, tree)
                results.append(op(*args, **kwargs))
        return torch.cat(results)[:count].reshape(shape)

    return run


def pow_of_number(self: float, exponent: Tensor) -> Tensor:
    """self ** exponent."""
    dtype = torch.result_type(self, exponent)
    return aligned("pow.Tensor_Tensor")(torch.tensor(self, dtype=dtype, device=exponent.device), exponent.to(dtype))


WITHOUT_POW = (-2, -1, 0, 0.5, 1, 2, 3)
"""Exponents for which torch multiplies, divides or takes a root, which each device rounds alike."""


def portable_pow(name: str) -> Function:
    """The contract's pow, or where torch needs none torch's own."""
    own: Function = pow_of_number if name == "pow.Scalar" else aligned(name)

    def run(self: Tensor | float, exponent: Tensor | float) -> Any:
        dtype = torch.result_type(self, exponent)
        if dtype in FLOATS and (isinstance(exponent, Tensor) or exponent not in WITHOUT_POW):
            return elementary.power(self, exponent, dtype)
        on_cpu = all(x.device.type == "cpu" for x in (self, exponent) if isinstance(x, Tensor))
        return own(self, exponent) if on_cpu else NotImplemented

    return run


def scaled_sum(name: str) -> Function:
    """add or sub: torch rounds alpha times a 16-bit number in some loops and not in others."""
    whole = aligned(name)

    def run(self: Tensor, other: Tensor, *, alpha: float = 1) -> Any:
        if alpha in (1, -1) or torch.result_type(self, other).itemsize != 2:
            return NotImplemented
        return whole(self, other, alpha=alpha)

    return run


def foreach_div(self: Sequence[Tensor], scalars: Sequence[float]) -> Any:
    """Each tensor divided by its number, as torch does on a GPU where all tensors are dense and alike.

    Where one is not, torch multiplies all of them by reciprocals.
    """
    if not all(x.dtype in (*FLOATS, *INTEGERS) for x in self) or _dense_and_alike(self):
        return NotImplemented
    with stock_kernels():
        return [torch._foreach_div([x.contiguous()], [number])[0] for x, number in zip(self, scalars, strict=True)]


def foreach_div_(self: Sequence[Tensor], scalars: Sequence[float]) -> Any:
    """`foreach_div` in place."""
    results = foreach_div(self, scalars)
    if results is NotImplemented:
        return results
    for x, result in zip(self, results, strict=True):
        x.copy_(result)
    return None


def _dense_and_alike(tensors: Sequence[Tensor]) -> bool:
    """Whether torch has one kernel for all of them."""
    return all(
        x.dtype == tensors[0].dtype
        and x.device == tensors[0].device
        and (x.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(x))
        for x in tensors
    )


def _padded(x: Tensor) -> Tensor:
    missing = -x.shape[0] % VECTORS
    return torch.cat((x, x.new_ones(missing))) if missing else x


def _both(name: str, function: Function, **options: Any) -> Override:
    return Override(name, function, in_place=f"{name}_", out=f"{name}.out", **options)


def _aligned() -> Iterator[Override]:
    yield Override("pow.Scalar", pow_of_number, out="pow.Scalar_out", devices=("cpu",), autograd=False)
    for name, out in (
        ("softplus", "softplus.out"),
        ("softplus_backward", "softplus_backward.grad_input"),
        ("mish_backward", None),
        ("elu_backward", "elu_backward.grad_input"),
        ("logaddexp", "logaddexp.out"),
        ("logaddexp2", "logaddexp2.out"),
        ("softshrink", "softshrink.out"),
        ("special_i0e", "special_i0e.out"),
    ):
        yield Override(name, aligned(name), out=out, devices=("cpu",), autograd=False)
    for name in ("mish", "exp2", "elu", "logit", "sinh", "cosh", "atanh", "atan2", "hypot", "igamma", "igammac"):
        yield _both(name, aligned(name), devices=("cpu",), autograd=False)
    for kind in ("Scalar", "Tensor"):
        name = f"pow.Tensor_{kind}"
        yield Override(name, aligned(name), f"pow_.{kind}", f"{name}_out", devices=("cpu",), autograd=False)
    for name in ("add", "sub"):
        function, in_place, out = scaled_sum(f"{name}.Tensor"), f"{name}_.Tensor", f"{name}.out"
        yield Override(f"{name}.Tensor", function, in_place, out, devices=("cpu",), autograd=False, exact=True)


OVERRIDES = (
    _both("gelu", _unary(pointwise.gelu)),
    _both("silu", _unary(pointwise.silu)),
    Override("glu", glu, out="glu.out"),
    Override("gelu_backward", _gradient(pointwise.gelu_backward), out="gelu_backward.grad_input", autograd=False),
    Override("silu_backward", _gradient(pointwise.silu_backward), out="silu_backward.grad_input", autograd=False),
    *(_both(name, _unary(getattr(pointwise, name)), devices=("cpu",), portable=True) for name in ("sigmoid", "rsqrt")),
    *(
        _both(name, _unary(getattr(pointwise, name)), devices=(), portable=True)
        for name in ("exp", "log", "tanh", "erf", "sin", "cos")
    ),
    *_aligned(),
    *(
        _both(name, _unary(function), devices=(), portable=True, autograd=False)
        for name, function in elementary.FUNCTIONS.items()
    ),
    *(
        Override(name, portable_pow(name), in_place, out, devices=(), portable=True, autograd=False)
        for name, in_place, out in (
            ("pow.Scalar", None, "pow.Scalar_out"),
            ("pow.Tensor_Scalar", "pow_.Scalar", "pow.Tensor_Scalar_out"),
            ("pow.Tensor_Tensor", "pow_.Tensor", "pow.Tensor_Tensor_out"),
        )
    ),
    Override("_foreach_div.ScalarList", foreach_div, devices=("cuda",), autograd=False),
    Override("_foreach_div_.ScalarList", foreach_div_, devices=("cuda",), autograd=False),
)
