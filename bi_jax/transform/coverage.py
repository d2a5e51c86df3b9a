"""What `batch_invariant` knows about JAX's primitives, and what it does about those whose bits may depend on the batch.

Integers and bools are exact in any order, so only primitives that compute with floats are of interest. Every primitive is in
one of the tables below, or it is replaced (`rules`), entered (`rewrite`), or not covered.
"""

import dataclasses
import warnings
from collections import Counter
from typing import Any, Literal, get_args

import jax.numpy as jnp
from jax._src import source_info_util

Policy = Literal["raise", "warn", "ignore"]

FLOATS = ("bfloat16", "float16", "float32")
"""Dtypes that are computed with."""

MOVED = frozenset(
    """
    all_gather all_gather_invariant all_to_all bitcast_convert_type broadcast_in_dim broadcast_to complex concatenate conj copy
    copy_p create_token after_all device_put dce_sink dynamic_slice dynamic_update_slice empty empty2 gather imag iota layout_constraint
    name optimization_barrier pad pbroadcast pcast ppermute pvary real reshape reshard rev scatter select_n sharding_constraint
    slice split squeeze stack stop_gradient tile transpose unstack with_memory_space_constraint zeros_like
    """.split()
)
"""They move bits."""

EXACT = frozenset(
    """
    abs and argmax argmin axis_index ceil clamp clz debug_callback debug_print eq eq_to floor ge gt inspect_sharding is_finite le le_to
    lt lt_to max min ne neg nextafter not or platform_index pmax pmin population_count random_bits random_clone random_fold_in
    random_seed random_split random_unwrap random_wrap reduce_and reduce_or reduce_precision reduce_xor rng_bit_generator round
    shift_left shift_right_arithmetic shift_right_logical sign sort stage threefry2x32 top_k xor
    """.split()
)
"""Each result is fixed by its operands: there is nothing to round, or only one way to do it."""

STOCK = frozenset(
    """
    acos asin atan2 atanh bessel_i0e bessel_i1e cbrt cosh digamma erf_inv erfc exp2 expm1 lgamma log1p log2 nextafter pow rem
    sinh tan
    """.split()
)
"""Functions of single elements that XLA computes the same way wherever an element is; the tests try them."""


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


_counts: Counter[str] = Counter()
_warned: set[str] = set()


def uncovered_counts() -> dict[str, int]:
    """How often each primitive that is not covered was met under the policies "warn" and "ignore"."""
    return dict(_counts)


def reset_uncovered() -> None:
    """Forget the counts, and which primitives were warned of."""
    _counts.clear()
    _warned.clear()


def report(eqn: Any, reason: str, policy: Policy) -> None:
    """Do what `policy` says about an equation that is not covered."""
    name = eqn.primitive.name
    message = (
        f"{name}({', '.join(x.aval.str_short(short_dtypes=True) for x in eqn.invars)}) at {source(eqn)}: the bits of a row may "
        f'depend on the batch, and batch_invariant does not cover it ({reason}); on_uncovered="warn" or "ignore" lets it run'
    )
    if policy == "raise":
        raise UncoveredOperationError(message)
    _counts[name] += 1
    if policy == "warn" and name not in _warned:
        _warned.add(name)
        warnings.warn(message, UncoveredOperationWarning, stacklevel=2)


def source(eqn: Any) -> str:
    """The user's line that an equation comes from."""
    return source_info_util.summarize(eqn.source_info)


def is_inexact(aval: Any) -> bool:
    """Whether an abstract value holds floats or complex numbers."""
    return hasattr(aval, "dtype") and jnp.issubdtype(aval.dtype, jnp.inexact)
