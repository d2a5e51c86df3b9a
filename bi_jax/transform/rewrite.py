"""A jaxpr computed batch-invariantly: every equation as its treatment says, those that hold jaxprs entered."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from jax._src import core as core_internals
from jax._src import flattree, source_info_util
from jax._src.interpreters import partial_eval as pe
from jax._src.util import weakref_lru_cache
from jax.extend.core import Jaxpr, Literal

from bi_jax.transform.coverage import Options, at_line_of, report
from bi_jax.transform.rules import treatment

CALLS = {"closed_call": "call_jaxpr", "core_call": "call_jaxpr", "custom_jvp_call": "call_jaxpr", "custom_partitioning": "call"}
CALLS |= {"custom_vjp_call": "call_jaxpr", "eval_jaxpr": "call_jaxpr", "custom_vmap_call": "call"}
"""Primitives that call a jaxpr, by the name of their parameter. It is computed in their place: what they add, rules of
differentiation, of batching or of partitioning, has had its turn, or does not apply to what takes the place of their parts."""

ENTERED = frozenset(["cond", "jit", "remat2", "scan", "shard_map", "while"])
"""Primitives whose parameters are jaxprs that are rewritten."""


@weakref_lru_cache
def rewritten(jaxpr: Jaxpr, options: Options) -> Jaxpr:
    """A jaxpr of the same type that computes `jaxpr` under `options`.

    Raises:
        UncoveredOperationError: a primitive is not covered.
    """

    def run(*operands: Any) -> list[Any]:
        return evaluate(jaxpr, options, operands)

    avals = flattree.flatten((tuple(jaxpr.in_avals), {}))
    return pe.trace_to_jaxpr_nocache(run, avals, jaxpr.debug_info.with_unknown_names())[0]


def evaluate(jaxpr: Jaxpr, options: Options, operands: Sequence[Any]) -> list[Any]:
    """The results of `jaxpr` on `operands`, under `options`."""
    values: dict[Any, Any] = dict(zip((*jaxpr.constvars, *jaxpr.invars), (*jaxpr.consts, *operands), strict=True))

    def read(atom: Any) -> Any:
        if not isinstance(atom, Literal):
            return values[atom]
        aval: Any = atom.aval
        return np.asarray(atom.val, aval.dtype)

    for eqn in jaxpr.eqns:
        stack = source_info_util.current_name_stack() + eqn.source_info.name_stack
        source = source_info_util.user_context(eqn.source_info.traceback, name_stack=stack)
        with source, eqn.ctx.manager, at_line_of(eqn):
            results = _computed(eqn, options, [read(x) for x in eqn.invars])
        values.update(zip(eqn.outvars, results, strict=True))
    return [read(x) for x in jaxpr.outvars]


def inner(eqn: Any, options: Options | None) -> tuple[list[Jaxpr], Options | None] | None:
    """The jaxprs in an equation, and the options that hold for them; None where it has none that are entered."""
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return [params[CALLS[name]]], options
    if name == "batch_invariant":
        own = params["options"]
        return [params["jaxpr"]], own if options is None else own.within(options)
    return (list(core_internals.jaxprs_in_params(params)), options) if name in ENTERED else None


def _computed(eqn: Any, options: Options, operands: list[Any]) -> list[Any]:
    name, params = eqn.primitive.name, eqn.params
    if name in CALLS:
        return evaluate(params[CALLS[name]], options, operands)
    if name == "batch_invariant":
        return evaluate(params["jaxpr"], params["options"].within(options), operands)
    if name == "shard_map":
        return _sharded(eqn, options, operands)
    if name in ENTERED:
        params = {key: _entered(value, options) for key, value in params.items()}
        return eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    chosen = treatment(eqn, options)
    if chosen.kind == "uncovered":
        report(eqn, chosen.by, options.on_uncovered)
    if chosen.compute is not None:
        return [chosen.compute(*operands)]
    results = eqn.primitive.bind(*operands, **eqn.primitive.get_bind_params(params))
    return list(results) if eqn.primitive.multiple_results else [results]


def _entered(parameter: Any, options: Options) -> Any:
    """A parameter of an equation, jaxprs rewritten."""
    if isinstance(parameter, Jaxpr):
        return rewritten(parameter, options)
    return tuple(_entered(x, options) for x in parameter) if type(parameter) is tuple else parameter


def _sharded(eqn: Any, options: Options, operands: Sequence[Any]) -> list[Any]:
    """A jaxpr in `jax.shard_map`, which sets up its mesh when it traces the function that computes it."""

    def run(*shards: Any) -> Any:
        return flattree.flatten(evaluate(eqn.params["jaxpr"], options, shards)).with_aux(eqn.params["out_specs"])

    return eqn.primitive.bind(*operands, **{**eqn.primitive.get_bind_params(eqn.params), "subfuns": (run,)})
