"""Steps of SGD and AdamW, and the clipping of gradients, with exact division and square root. Nothing here has a gradient.

Parameters, gradients and what belongs to them are arrays, or pytrees of one structure.
"""

from typing import Any

import jax
import jax.numpy as jnp

from bi_jax.rows.arguments import array, check_number, check_shape
from bi_jax.rows.op import Op, row_op
from shared_specs.programs import optimizer as programs

Tree = Any
Number = float | jax.Array

_norm_squared = row_op("clip_by_global_norm", programs.SUM_OF_SQUARES)
_clip_factor = row_op("clip_by_global_norm", programs.CLIP_FACTOR)
_scale = row_op("clip_by_global_norm", programs.SCALE)

_sgd = row_op("sgd", programs.sgd(momentum=False, nesterov=False, first=False))
_sgd_momentum = row_op("sgd", lambda e: programs.sgd(True, nesterov=False, first=e.buffer is None))
_sgd_nesterov = row_op("sgd", lambda e: programs.sgd(True, nesterov=True, first=e.buffer is None))
_adamw = row_op("adamw", programs.ADAMW)


def clip_by_global_norm(grads: Tree, max_norm: Number) -> tuple[Tree, jax.Array]:
    """The gradients times min(1, max_norm / (norm + 1e-6)), and their norm in float32.

    The norm is the root of the sum, in the order of the leaves, of the sums of squares of each.
    """
    leaves, structure = jax.tree.flatten(grads)
    if not leaves:
        raise ValueError("bi_jax.clip_by_global_norm: grads must not be empty")
    check_number("clip_by_global_norm", "max_norm", max_norm, float("-inf"))
    leaves = [array("clip_by_global_norm", f"grads[{i}]", x) for i, x in enumerate(leaves)]
    rows = [x.reshape(1, x.size) for x in leaves]
    squares = jnp.concatenate([_norm_squared(x=row).y for row in rows])
    total = _clip_factor(x=squares[None], max_norm=max_norm)
    clipped = [_scale(x.dtype, x=row, factor=total.factor).y.reshape(x.shape) for row, x in zip(rows, leaves, strict=True)]
    return jax.tree.unflatten(structure, clipped), total.norm[0]


def sgd(
    param: Tree,
    grad: Tree,
    buffer: Tree | None = None,
    *,
    lr: Number,
    momentum: Number = 0.0,
    dampening: Number = 0.0,
    weight_decay: Number = 0.0,
    nesterov: bool = False,
) -> tuple[Tree, Tree | None]:
    """One step of torch.optim.SGD: the new parameter and the new momentum buffer.

    The buffer is None without momentum; on the first step none is given, and it becomes the gradient.
    """
    numbers = {"lr": lr, "momentum": momentum, "dampening": dampening, "weight_decay": weight_decay}
    _check_numbers("sgd", **numbers)
    has_momentum = isinstance(momentum, jax.core.Tracer) or bool(momentum != 0)
    if buffer is not None and not has_momentum:
        raise ValueError("bi_jax.sgd: a buffer needs momentum")
    if nesterov and (not has_momentum or isinstance(dampening, jax.core.Tracer) or dampening != 0):
        raise ValueError("bi_jax.sgd: nesterov needs momentum and no dampening")
    if not has_momentum:
        return _update("sgd", _sgd, {"p": param, "g": grad}, ("p",), lr=lr, weight_decay=weight_decay)[0], None
    trees = {"p": param, "g": grad} | ({} if buffer is None else {"buffer": buffer})
    new, buffer = _update("sgd", _sgd_nesterov if nesterov else _sgd_momentum, trees, ("p", "buffer"), **numbers)
    return new, buffer


def adamw(
    param: Tree,
    grad: Tree,
    m: Tree,
    v: Tree,
    step: int | jax.Array,
    *,
    lr: Number = 1e-3,
    betas: tuple[Number, Number] = (0.9, 0.999),
    eps: Number = 1e-8,
    weight_decay: Number = 1e-2,
) -> tuple[Tree, Tree, Tree]:
    """Step number `step`, from 1, of torch.optim.AdamW: the new parameter and the new moments."""
    numbers = {"lr": lr, "beta1": betas[0], "beta2": betas[1], "eps": eps, "weight_decay": weight_decay}
    _check_numbers("adamw", **numbers)
    if not jnp.issubdtype(jnp.result_type(step), jnp.integer):
        raise TypeError(f"bi_jax.adamw: step must be an integer, got {jnp.result_type(step)}")
    check_number("adamw", "step", step, 1)
    p, m, v = _update("adamw", _adamw, {"p": param, "g": grad, "m": m, "v": v}, ("p", "m", "v"), **numbers, step=step)
    return p, m, v


_NAMES = {"p": "param", "g": "grad"}


def _update(name: str, op: Op, trees: dict[str, Tree], results: tuple[str, ...], **numbers: Any) -> list[Tree]:
    """The results of `op` on every leaf of the trees, as trees."""
    structure: Any = jax.tree.structure(trees["p"])
    lists = {key: jax.tree.leaves(tree) for key, tree in trees.items()}
    for key, tree in trees.items():
        if (own := jax.tree.structure(tree)) != structure:
            raise ValueError(f"bi_jax.{name}: {_NAMES.get(key, key)} must have the structure of param, {structure}, got {own}")
    outputs: list[list[jax.Array]] = [[] for _ in results]
    for i in range(structure.num_leaves):
        arrays = {key: array(name, _NAMES.get(key, key), leaf[i]) for key, leaf in lists.items()}
        shape = arrays["p"].shape
        for key, x in arrays.items():
            check_shape(name, _NAMES.get(key, key), x, shape)
        rows = {"buffer": None} | {key: x.reshape(1, x.size) for key, x in arrays.items()}
        out = op(arrays["p"].dtype, **rows, **numbers)
        for values, key in zip(outputs, results, strict=True):
            values.append(getattr(out, key).reshape(shape))
    return [jax.tree.unflatten(structure, values) for values in outputs]


def _check_numbers(name: str, **numbers: Any) -> None:
    for key, x in numbers.items():
        check_number(name, key, x, float("-inf"))
