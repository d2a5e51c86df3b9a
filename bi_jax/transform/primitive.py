"""The higher-order primitive behind `batch_invariant`: a jaxpr that is to be computed batch-invariantly.

Differentiation and batching act on the jaxpr as it was written and give such a primitive again. Its operations are replaced
last, when it is lowered; so what replaces them needs no derivative, and gradients are batch-invariant as well, whether
`grad` is inside or outside.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax import core
from jax._src import ad_util, source_info_util
from jax._src import core as core_internals
from jax._src.interpreters import ad as ad_internals
from jax._src.interpreters import batching as batching_internals
from jax._src.interpreters import partial_eval as pe
from jax.extend.core import Jaxpr, Primitive
from jax.interpreters import ad, mlir

from bi_jax.transform.coverage import Options
from bi_jax.transform.rewrite import rewritten

invariant_p = Primitive("batch_invariant")
invariant_p.multiple_results = True


def bind(jaxpr: Jaxpr, operands: Sequence[Any], options: Options, *, check: bool = False) -> list[Any]:
    """The results of `jaxpr` on `operands`, to be computed under `options`. With `check`, what is not covered raises now."""
    consts, jaxpr = jaxpr.consts, pe.convert_constvars_jaxpr(jaxpr)
    if check:
        rewritten(jaxpr, options)
    return invariant_p.bind(*consts, *operands, jaxpr=jaxpr, options=options)


@invariant_p.def_impl
def _eager(*operands: jax.Array, jaxpr: Jaxpr, options: Options) -> list[jax.Array]:
    return core_internals.jaxpr_as_fun(rewritten(jaxpr, options))(*operands)


@invariant_p.def_effectful_abstract_eval
def _abstract(*_: Any, jaxpr: Jaxpr, options: Options) -> tuple[list[core.ShapedArray], Any]:
    return jaxpr.out_avals, core_internals.positional_effects(jaxpr)


def _compute(*operands: jax.Array, jaxpr: Jaxpr, options: Options) -> list[jax.Array]:
    return core_internals.jaxpr_as_fun(rewritten(jaxpr, options))(*operands)


mlir.register_lowering(invariant_p, mlir.lower_fun(_compute, multiple_results=True))


def _jvp(primals: Sequence[Any], tangents: Sequence[Any], *, jaxpr: Jaxpr, options: Options) -> tuple[list[Any], list[Any]]:
    nonzero = [type(t) is not ad.Zero for t in tangents]
    jvp_jaxpr, out_nonzero = ad_internals.jvp_jaxpr(jaxpr, nonzero, False)
    given = [t for t in tangents if type(t) is not ad.Zero]
    outs = bind(jvp_jaxpr, [*primals, *given], options)
    results, rest = outs[: len(jaxpr.outvars)], iter(outs[len(jaxpr.outvars) :])
    return results, [next(rest) if is_given else ad_util.p2tz(x) for x, is_given in zip(results, out_nonzero, strict=True)]


ad.primitive_jvps[invariant_p] = _jvp


def _partial_eval(trace: Any, *tracers: Any, jaxpr: Jaxpr, options: Options) -> list[Any]:
    """What is known is computed at once, with what the rest needs of it; the rest becomes an equation."""
    unknown = [not t.is_known() for t in tracers]
    known_jaxpr, rest_jaxpr, out_unknown, residual_avals = pe.partial_eval_jaxpr_nounits(jaxpr, unknown, False)
    outs = bind(known_jaxpr, [t.pval.get_known() for t in tracers if t.is_known()], options)
    count = len(outs) - len(residual_avals)
    known_outs, residuals = outs[:count], outs[count:]
    consts, rest_jaxpr = rest_jaxpr.consts, pe.convert_constvars_jaxpr(rest_jaxpr)
    inputs = [
        *map(trace.new_instantiated_const, [*consts, *residuals]),
        *(trace.instantiate_const(t) for t in tracers if not t.is_known()),
    ]
    results = [pe.JaxprTracer(trace, pe.PartialVal.unknown(aval), None) for aval in rest_jaxpr.out_avals]
    recipe = pe.new_eqn_recipe(
        trace,
        inputs,
        results,
        invariant_p,
        {"jaxpr": rest_jaxpr, "options": options},
        core_internals.positional_effects(rest_jaxpr),
        source_info_util.current(),
    )
    for tracer in results:
        tracer.recipe = recipe
    known, rest = iter(known_outs), iter(results)
    return [next(rest) if is_unknown else next(known) for is_unknown in out_unknown]


pe.custom_partial_eval_rules[invariant_p] = _partial_eval


def _keep_params(*arguments: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    *_, known, staged = arguments
    return known, staged


def _partial_eval_in_jaxpr(*arguments: Any) -> Any:
    """Under `jax.checkpoint`, whose policy decides what is saved."""
    return pe.closed_call_partial_eval_custom_rule("jaxpr", _keep_params, *arguments)


pe.partial_eval_jaxpr_custom_rules[invariant_p] = _partial_eval_in_jaxpr


def _transpose(cotangents: Sequence[Any], *operands: Any, jaxpr: Jaxpr, options: Options) -> list[Any]:
    linear = [ad.is_undefined_primal(x) for x in operands]
    given = [x for x, is_linear in zip(operands, linear, strict=True) if not is_linear]
    nonzero = [g for g in cotangents if type(g) is not ad.Zero]
    found: list[bool] = []

    def backward(given: list[Any], nonzero: list[Any]) -> list[Any]:
        """The nonzero cotangents of the linear operands; `found` says which they are."""
        rest, nonlinear = iter(nonzero), iter(given)
        outs = [g if type(g) is ad.Zero else next(rest) for g in cotangents]
        ins = [
            ad.UndefinedPrimal(aval) if is_linear else next(nonlinear)
            for aval, is_linear in zip(jaxpr.in_avals, linear, strict=True)
        ]
        results = ad.backward_pass(jaxpr, False, (), ins, outs)
        wanted = [g for g, is_linear in zip(results, linear, strict=True) if is_linear]
        found[:] = [type(g) is not ad.Zero for g in wanted]
        return [g for g in wanted if type(g) is not ad.Zero]

    outs = iter(bind(jax.make_jaxpr(backward)(given, nonzero), [*given, *nonzero], options))
    present = iter(found)
    return [
        None if not is_linear else next(outs) if next(present) else ad.Zero(aval.to_ct_aval())
        for aval, is_linear in zip(jaxpr.in_avals, linear, strict=True)
    ]


ad.primitive_transposes[invariant_p] = _transpose


def _batch(
    axis_data: Any, operands: Sequence[Any], axes: Sequence[int | None], *, jaxpr: Jaxpr, options: Options
) -> tuple[list[Any], list[int | None]]:
    leave = [batching_internals.zero_if_mapped] * len(jaxpr.outvars)
    batched, mapped = batching_internals.batch_jaxpr_axes(jaxpr, axis_data, axes, leave)
    return bind(batched, operands, options), [0 if is_mapped else None for is_mapped in mapped]


batching_internals.fancy_primitive_batchers[invariant_p] = _batch


def _drop_unused(used: list[bool], eqn: Any) -> tuple[list[bool], Any]:
    if not any(used) and not pe.has_effects(eqn):
        return [False] * len(eqn.invars), None
    jaxpr, used_inputs = pe.dce_jaxpr(eqn.params["jaxpr"], used)
    inputs = [x for x, is_used in zip(eqn.invars, used_inputs, strict=True) if is_used]
    outputs = [x for x, is_used in zip(eqn.outvars, used, strict=True) if is_used]
    effects = core_internals.eqn_effects(jaxpr, inputs)
    params = {**eqn.params, "jaxpr": jaxpr}
    return used_inputs, pe.new_jaxpr_eqn(inputs, outputs, eqn.primitive, params, effects, eqn.source_info, eqn.ctx)


pe.dce_rules[invariant_p] = _drop_unused
