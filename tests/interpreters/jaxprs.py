"""Jaxprs evaluated by NumPy, equation after equation.

Interpret mode turns a kernel into a program of host callbacks with a little integer arithmetic between them. XLA would compile
that program anew for every shape and schedule, which takes longer than to run it once, and would flush subnormals.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, Literal

Values = Sequence[np.ndarray]


def evaluate(closed: ClosedJaxpr, *args: Any) -> list[np.ndarray]:
    """The outputs of a jaxpr for `args`."""
    with np.errstate(all="ignore"):
        return _run(closed.jaxpr, closed.consts, [np.asarray(x) for x in args])


def _run(jaxpr: Jaxpr, consts: Sequence[Any], args: Values) -> list[np.ndarray]:
    values = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*map(np.asarray, consts), *args), strict=True))

    def read(atom: Any) -> np.ndarray:
        return np.asarray(atom.val, atom.aval.dtype) if isinstance(atom, Literal) else values[atom]

    for equation in jaxpr.eqns:
        name = equation.primitive.name
        if name not in _RULES:
            raise NotImplementedError(f"no rule for {name}")
        outputs = _RULES[name](*map(read, equation.invars), **equation.params)
        for var, value in zip(equation.outvars, outputs if equation.primitive.multiple_results else [outputs], strict=True):
            value = np.asarray(value)
            assert (value.shape, value.dtype) == (var.aval.shape, var.aval.dtype), equation
            values[var] = value
    return [read(atom) for atom in jaxpr.outvars]


def _closed(closed: ClosedJaxpr, args: Values) -> list[np.ndarray]:
    return _run(closed.jaxpr, closed.consts, args)


def _elementwise(ufunc: Callable[..., np.ndarray]) -> Callable[..., np.ndarray]:
    return lambda *args, **_: ufunc(*args)


def _quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """Of integers: towards zero."""
    assert np.issubdtype(x.dtype, np.integer), x.dtype
    return (x - np.fmod(x, y)) // y


def _shift_right_logical(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    unsigned = f"uint{8 * x.dtype.itemsize}"
    return (x.view(unsigned) >> y.view(unsigned)).view(x.dtype)


def _select(which: np.ndarray, *cases: np.ndarray) -> np.ndarray:
    assert which.dtype == np.bool_
    return np.where(which, cases[1], cases[0])


def _bitcast(x: np.ndarray, *, new_dtype: np.dtype) -> np.ndarray:
    assert x.dtype.itemsize == np.dtype(new_dtype).itemsize
    return x.view(new_dtype)


def _broadcast(x: np.ndarray, *, shape: tuple[int, ...], broadcast_dimensions: tuple[int, ...], **_: Any) -> np.ndarray:
    aligned = [1] * len(shape)
    for axis, extent in zip(broadcast_dimensions, x.shape, strict=True):
        aligned[axis] = extent
    return np.broadcast_to(x.reshape(aligned), shape)


def _slice(x: np.ndarray, *, start_indices: Sequence[int], limit_indices: Sequence[int], strides: Any) -> np.ndarray:
    return x[tuple(map(slice, start_indices, limit_indices, strides or [1] * x.ndim))]


def _dynamic_slice(x: np.ndarray, *starts: np.ndarray, slice_sizes: Sequence[int], **_: Any) -> np.ndarray:
    starts_inside = [int(np.clip(i, 0, n - size)) for i, n, size in zip(starts, x.shape, slice_sizes, strict=True)]
    return x[tuple(slice(i, i + size) for i, size in zip(starts_inside, slice_sizes, strict=True))]


def _multiple_of(x: np.ndarray, *, values: Any) -> np.ndarray:
    assert not np.any(x % values), "the kernel promised a multiple"
    return x


def _while(
    *args: np.ndarray, cond_nconsts: int, body_nconsts: int, cond_jaxpr: ClosedJaxpr, body_jaxpr: ClosedJaxpr, **_: Any
) -> Values:
    cond_consts, body_consts = args[:cond_nconsts], args[cond_nconsts : cond_nconsts + body_nconsts]
    carry: Values = args[cond_nconsts + body_nconsts :]
    while _closed(cond_jaxpr, [*cond_consts, *carry])[0]:
        carry = _closed(body_jaxpr, [*body_consts, *carry])
    return carry


def _scan(*args: np.ndarray, jaxpr: ClosedJaxpr, length: int, ft_in: Any, ft_out: Any, reverse: bool, **_: Any) -> Values:
    consts, carry, xs = map(list, ft_in.update(args).unpack())
    assert not reverse
    assert len(xs) == len(ft_out) - len(carry) == 0, "a loop, not a map"
    for _i in range(length):
        carry = _closed(jaxpr, [*consts, *carry])
    return carry


def _cond(index: np.ndarray, *args: np.ndarray, branches: Sequence[ClosedJaxpr], **_: Any) -> Values:
    return _closed(branches[int(np.clip(index, 0, len(branches) - 1))], args)


def _callback(*args: np.ndarray, callback: Callable[..., Sequence[Any]], **_: Any) -> Values:
    return callback(*args)


_UFUNCS = {
    "add": np.add,
    "sub": np.subtract,
    "mul": np.multiply,
    "rem": np.fmod,
    "abs": np.abs,
    "sign": np.sign,
    "max": np.maximum,
    "min": np.minimum,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "eq": np.equal,
    "ne": np.not_equal,
    "lt": np.less,
    "gt": np.greater,
    "ge": np.greater_equal,
    "shift_left": np.left_shift,
}
_RULES: dict[str, Callable[..., Any]] = {
    **{name: _elementwise(ufunc) for name, ufunc in _UFUNCS.items()},
    "div": _quotient,
    "shift_right_logical": _shift_right_logical,
    "select_n": _select,
    "multiple_of": _multiple_of,
    "bitcast_convert_type": _bitcast,
    "broadcast_in_dim": _broadcast,
    "slice": _slice,
    "dynamic_slice": _dynamic_slice,
    "clamp": lambda low, x, high: np.clip(x, low, high),
    "convert_element_type": lambda x, *, new_dtype, **_: x.astype(new_dtype),
    "squeeze": lambda x, *, dimensions: np.squeeze(x, dimensions),
    "concatenate": lambda *xs, dimension: np.concatenate(xs, dimension),
    "jit": lambda *args, jaxpr, **_: _closed(jaxpr, args),
    "while": _while,
    "scan": _scan,
    "cond": _cond,
    "io_callback": _callback,
    "pure_callback": _callback,
}
