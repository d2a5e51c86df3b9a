"""What `batch_invariant` knows about JAX's primitives, and what it does about those whose bits may depend on the batch.

Integers and bools are exact in any order, so only primitives that compute with floats are of interest. Every primitive is in
one of the tables below, or it is replaced (`rules`), entered (`rewrite`), or not covered.
"""

import contextlib
import dataclasses
import traceback
import warnings
from collections import Counter
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax._src import source_info_util

Policy = Literal["raise", "warn", "ignore"]

_PACKAGE = str(Path(__file__).parent)

FLOATS = ("bfloat16", "float16", "float32")
"""Dtypes that are computed with."""


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


MOVED = _names("""
    after_all all_gather all_gather_invariant all_to_all bitcast_convert_type broadcast_in_dim broadcast_to complex concatenate
    conj copy create_token dce_sink device_put dynamic_slice dynamic_update_slice empty empty2 gather imag iota
    layout_constraint name optimization_barrier pad pbroadcast pcast ppermute pvary real reshape reshard rev scatter select_n
    sharding_constraint slice split squeeze stack stop_gradient tile transpose unstack with_memory_space_constraint
""")
"""They move bits."""

EXACT = _names("""
    abs argmax argmin axis_index ceil clamp debug_callback debug_print eq eq_to floor ge gt inspect_sharding is_finite le le_to
    lt lt_to max min ne neg nextafter pmax pmin random_bits random_clone random_fold_in random_seed random_split random_unwrap
    random_wrap reduce_precision rng_bit_generator round sign sort stage top_k
""")
"""Each result is fixed by its operands: there is nothing to round, or only one way to do it."""

COMPUTED = _names("""
    acos asin atanh bessel_i0e bessel_i1e cbrt cosh erf_inv rem sinh tan
""")
"""Functions of single elements that XLA computes in the same way wherever an element is, as tests find."""


class UncoveredOperationError(RuntimeError):
    """A primitive whose result for a row may depend on the batch, in a function that is to be batch-invariant."""


class UncoveredOperationWarning(UserWarning):
    """As UncoveredOperationError, for `on_uncovered="warn"`."""


@dataclasses.dataclass(frozen=True)
class Options:
    """What `batch_invariant` was asked for.

    Attributes:
        portable: elementary functions and roundings are the contract's too.
        on_uncovered: what to do about a primitive that is not covered.
    """

    portable: bool = False
    on_uncovered: Policy = "raise"

    def __post_init__(self) -> None:
        if self.on_uncovered not in get_args(Policy):
            raise ValueError(f"on_uncovered is one of {', '.join(get_args(Policy))}, not {self.on_uncovered!r}")

    def within(self, outer: "Options") -> "Options":
        """What holds for a transformed function that another one calls."""
        return dataclasses.replace(self, portable=self.portable or outer.portable)


_found: set[tuple[str, str, str]] = set()
_warned: set[str] = set()
_line: ContextVar[str] = ContextVar("line", default="")


def uncovered_counts() -> dict[str, int]:
    """In how many places each primitive that is not covered was met under the policies "warn" and "ignore".

    A place is a line of the user's with the types of the operands.
    """
    return dict(Counter(name for name, _, _ in _found))


def reset_uncovered() -> None:
    """Forget the places, and which primitives were warned of."""
    _found.clear()
    _warned.clear()


def report(eqn: Any, reason: str, policy: Policy) -> None:
    """Do what `policy` says about an equation that is not covered."""
    name, types = eqn.primitive.name, ", ".join(x.aval.str_short(short_dtypes=True) for x in eqn.invars)
    with at_line_of(eqn) as line:
        message = (
            f"{name}({types}) at {line}: the bits of a row may depend on the batch, and batch_invariant does not cover it "
            f'({reason}); on_uncovered="warn" or "ignore" lets it run'
        )
    if policy == "raise":
        raise UncoveredOperationError(message)
    _found.add((name, types, line))
    if policy == "warn" and name not in _warned:
        _warned.add(name)
        warnings.warn(message, UncoveredOperationWarning, stacklevel=2)


@contextlib.contextmanager
def at_line_of(eqn: Any) -> Iterator[str]:
    """The user's line that an equation comes from: its own, or that of the equation which this one is inside of."""
    frames = source_info_util.user_frames(eqn.source_info.traceback)
    own = next((f"{frame.file_name}:{frame.start_line}" for frame in frames if not frame.file_name.startswith(_PACKAGE)), "")
    token = _line.set(own or _line.get())
    try:
        yield _line.get() or _calling_line()
    finally:
        _line.reset(token)


def _calling_line() -> str:
    """The innermost line of the stack that is neither of this package nor of JAX."""
    for frame in reversed(traceback.extract_stack()):
        if not frame.filename.startswith(_PACKAGE) and source_info_util.is_user_filename(frame.filename):
            return f"{frame.filename}:{frame.lineno}"
    return "an unknown line"


def is_inexact(aval: Any) -> bool:
    """Whether an abstract value holds floats or complex numbers."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
