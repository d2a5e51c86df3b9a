"""`batch_invariant`: the transformation that a user calls."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, overload

import jax
import numpy as np

from bi_jax.transform import primitive
from bi_jax.transform.coverage import Options, Policy

Function = Callable[..., Any]


@overload
def batch_invariant(
    fn: Function,
    *,
    portable: bool = ...,
    on_uncovered: Policy = ...,
    static_argnums: int | Sequence[int] = ...,
    static_argnames: str | Sequence[str] = ...,
) -> Function: ...


@overload
def batch_invariant(
    fn: None = None,
    *,
    portable: bool = ...,
    on_uncovered: Policy = ...,
    static_argnums: int | Sequence[int] = ...,
    static_argnames: str | Sequence[str] = ...,
) -> Callable[[Function], Function]: ...


def batch_invariant(
    fn: Function | None = None,
    *,
    portable: bool = False,
    on_uncovered: Policy = "raise",
    static_argnums: int | Sequence[int] = (),
    static_argnames: str | Sequence[str] = (),
) -> Any:
    """A function that computes `fn` with bits that do not depend on the batch.

    Products, sums, maxima and minima are those of this library's contracts, and arithmetic is rounded where `fn` says so,
    whatever XLA fuses. It enters jit, scan, while, cond, custom derivatives, checkpoint and shard_map, and composes with grad,
    vmap and jit on either side. Like `jax.jit`, it traces `fn`: arguments and results are pytrees of arrays, but for those
    named static.

    Args:
        fn: any function of JAX. Without it, a decorator with the other arguments is returned.
        portable: elementary functions are the contract's as well, on a GPU too, and subnormals are kept on a CPU, so that
            another framework can have the same bits.
        on_uncovered: what becomes of a primitive whose bits may depend on the batch and that is not covered: "raise", "warn"
            (once a primitive) or "ignore".
        static_argnums: as of `jax.jit`.
        static_argnames: as of `jax.jit`.

    Raises:
        UncoveredOperationError: when the function is traced, or its gradient lowered; it names the primitive, the types of its
            operands and the user's line.
    """
    options = Options(portable, on_uncovered)
    if fn is None:
        return functools.partial(
            batch_invariant,
            portable=portable,
            on_uncovered=on_uncovered,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
        )

    @functools.wraps(fn)
    def transformed(*args: Any, **kwargs: Any) -> Any:
        return _bind(fn, options, args, kwargs)

    return jax.jit(transformed, static_argnums=static_argnums, static_argnames=static_argnames)


def _bind(fn: Function, options: Options, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """`fn` as one primitive of the arrays among its arguments; what is no array is static."""
    leaves, structure = jax.tree.flatten((args, kwargs))
    places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, jax.Array | np.ndarray)]

    def of_arrays(*arrays: jax.Array) -> Any:
        given = dict(zip(places, arrays, strict=True))
        args, kwargs = jax.tree.unflatten(structure, [given.get(i, leaf) for i, leaf in enumerate(leaves)])
        return fn(*args, **kwargs)

    arrays = [leaves[i] for i in places]
    jaxpr, shapes = jax.make_jaxpr(of_arrays, return_shape=True)(*arrays)
    return jax.tree.unflatten(jax.tree.structure(shapes), primitive.bind(jaxpr, arrays, options, check=True))
