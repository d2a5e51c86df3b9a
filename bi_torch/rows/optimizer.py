"""Steps of SGD and AdamW, and the clipping of gradients, with exact division and square root. Nothing here has a gradient."""

from collections.abc import Sequence

import torch
from torch import Tensor

from bi_torch.rows.arguments import check_shape, check_tensor
from bi_torch.rows.library import RowOp, in_place_op
from shared_specs.programs import optimizer as programs

_norm_squared = RowOp("sum_of_squares(Tensor x) -> Tensor y", programs.SUM_OF_SQUARES)
_clip_factor = RowOp("clip_factor(Tensor x, float max_norm) -> (Tensor norm, Tensor factor)", programs.CLIP_FACTOR)
_scale = RowOp("scale(Tensor x, Tensor factor, ScalarType dtype) -> Tensor y", programs.SCALE)

_sgd_program = programs.sgd(momentum=False, nesterov=False, first=False)
_sgd = RowOp("sgd(Tensor p, Tensor g, float lr, float weight_decay) -> Tensor p", _sgd_program)
_sgd_in_place = in_place_op("sgd_(Tensor(a!) p, Tensor g, float lr, float weight_decay) -> ()", lambda e: _sgd_program)

_MOMENTUM = "float lr, float weight_decay, float momentum, float dampening, bool nesterov"
_sgd_momentum = RowOp(
    f"sgd_momentum(Tensor p, Tensor g, Tensor? buffer, {_MOMENTUM}, ScalarType dtype) -> (Tensor p, Tensor buffer)",
    lambda e: programs.sgd(momentum=True, nesterov=e.nesterov, first=e.buffer is None),
)
_sgd_momentum_in_place = in_place_op(
    f"sgd_momentum_(Tensor(a!) p, Tensor g, Tensor(b!) buffer, {_MOMENTUM}, bool first) -> ()",
    lambda e: programs.sgd(momentum=True, nesterov=e.nesterov, first=e.first),
)

_ADAMW = "float lr, float beta1, float beta2, float eps, float weight_decay, int step"
_adamw = RowOp(f"adamw(Tensor p, Tensor g, Tensor m, Tensor v, {_ADAMW}) -> (Tensor p, Tensor m, Tensor v)", programs.ADAMW)
_adamw_in_place = in_place_op(
    f"adamw_(Tensor(a!) p, Tensor g, Tensor(b!) m, Tensor(c!) v, {_ADAMW}) -> ()", lambda e: programs.ADAMW
)


@torch.no_grad()
def clip_by_global_norm(grads: Sequence[Tensor], max_norm: float) -> tuple[list[Tensor], Tensor]:
    """The gradients times min(1, max_norm / (norm + 1e-6)), and their norm in float32.

    The norm is the root of the sum, in the order of `grads`, of the sums of squares of each.
    """
    grads = list(grads)
    if not grads:
        raise ValueError("bi_torch.clip_by_global_norm: grads must not be empty")
    for i, grad in enumerate(grads):
        check_tensor("clip_by_global_norm", f"grads[{i}]", grad, like=grads[0] if i else None)
    rows = [_one_row(grad) for grad in grads]
    squares = torch.cat([_norm_squared(row) for row in rows])
    norm, factor = _clip_factor(squares[None], float(max_norm))
    clipped = [_scale(row, factor, row.dtype).reshape(grad.shape) for row, grad in zip(rows, grads, strict=True)]
    return clipped, norm[0]


@torch.no_grad()
def sgd(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """One step of torch.optim.SGD: the new parameter and the new momentum buffer.

    The buffer is None without momentum; on the first step none is given, and it becomes the gradient.
    """
    _check_sgd("sgd", param, grad, buffer, momentum, dampening, nesterov)
    p, g = _one_row(param), _one_row(grad)
    if momentum == 0:
        return _sgd(p, g, float(lr), float(weight_decay)).reshape(param.shape), None
    options = float(lr), float(weight_decay), float(momentum), float(dampening), nesterov
    p, new = _sgd_momentum(p, g, None if buffer is None else _one_row(buffer), *options, param.dtype)
    return p.reshape(param.shape), new.reshape(param.shape)


@torch.no_grad()
def sgd_(
    param: Tensor,
    grad: Tensor,
    buffer: Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
) -> Tensor | None:
    """`sgd` in place of `param` and `buffer`; returns the buffer, a new one on the first step with momentum."""
    _check_sgd("sgd_", param, grad, buffer, momentum, dampening, nesterov)
    p, g = _view("sgd_", "param", param), _one_row(grad)
    if momentum == 0:
        _sgd_in_place(p, g, float(lr), float(weight_decay))
        return None
    options = float(lr), float(weight_decay), float(momentum), float(dampening), nesterov
    new = torch.empty_like(param, memory_format=torch.contiguous_format) if buffer is None else buffer
    _sgd_momentum_in_place(p, g, _view("sgd_", "buffer", new), *options, buffer is None)
    return new


@torch.no_grad()
def adamw(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> tuple[Tensor, Tensor, Tensor]:
    """Step number `step`, from 1, of torch.optim.AdamW: the new parameter and the new moments."""
    _check_adamw("adamw", param, grad, m, v, step)
    options = float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), step
    p, new_m, new_v = _adamw(*(_one_row(x) for x in (param, grad, m, v)), *options)
    return p.reshape(param.shape), new_m.reshape(param.shape), new_v.reshape(param.shape)


@torch.no_grad()
def adamw_(
    param: Tensor,
    grad: Tensor,
    m: Tensor,
    v: Tensor,
    step: int,
    *,
    lr: float = 1e-3,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> None:
    """`adamw` in place of `param`, `m` and `v`."""
    _check_adamw("adamw_", param, grad, m, v, step)
    options = float(lr), float(betas[0]), float(betas[1]), float(eps), float(weight_decay), step
    views = (_view("adamw_", name, x) for name, x in (("m", m), ("v", v)))
    _adamw_in_place(_view("adamw_", "param", param), _one_row(grad), *views, *options)


def _one_row(x: Tensor) -> Tensor:
    return x.reshape(1, x.numel())


def _view(op: str, name: str, x: Tensor) -> Tensor:
    """One row in the memory of `x`."""
    if not x.is_contiguous():
        raise RuntimeError(f"bi_torch.{op}: {name} must be contiguous, got shape {list(x.shape)} and stride {list(x.stride())}")
    return x.view(1, x.numel())


def _check(op: str, param: Tensor, **others: Tensor) -> None:
    check_tensor(op, "param", param)
    for name, x in others.items():
        check_tensor(op, name, x, like=param)
        check_shape(op, name, x, param.shape)


def _check_sgd(
    op: str, param: Tensor, grad: Tensor, buffer: Tensor | None, momentum: float, dampening: float, nesterov: bool
) -> None:
    _check(op, param, grad=grad, **({} if buffer is None else {"buffer": buffer}))
    if buffer is not None and momentum == 0:
        raise ValueError(f"bi_torch.{op}: a buffer needs momentum")
    if nesterov and (momentum <= 0 or dampening != 0):
        raise ValueError(f"bi_torch.{op}: nesterov needs momentum and no dampening")


def _check_adamw(op: str, param: Tensor, grad: Tensor, m: Tensor, v: Tensor, step: int) -> None:
    _check(op, param, grad=grad, m=m, v=v)
    if not isinstance(step, int) or step < 1:
        raise ValueError(f"bi_torch.{op}: step must be a positive int, got {step!r}")
