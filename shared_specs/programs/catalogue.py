"""Every program in every variant, by family: what tests and `verify` run."""

from itertools import product
from types import ModuleType

from shared_specs.formats import FORMATS
from shared_specs.programs import attention, norm, optimizer, pointwise, reduce, softmax
from shared_specs.rows import ColumnProgram, RowProgram

_CHOICES = (False, True)

SCALARS: dict[str, float | int] = {
    "eps": 1e-5,
    "correction": 1.0,
    "temperature": 0.7,
    "smoothing": 0.1,
    "lr": 1e-3,
    "weight_decay": 0.01,
    "momentum": 0.9,
    "dampening": 0.1,
    "beta1": 0.9,
    "beta2": 0.999,
    "max_norm": 1.0,
    "step": 3,
    "ignore_index": 1,
}
"""A value for every scalar that a program takes."""


def _constants(module: ModuleType) -> tuple[RowProgram, ...]:
    return tuple(value for value in vars(module).values() if isinstance(value, RowProgram))


ROW_PROGRAMS: dict[str, tuple[RowProgram, ...]] = {
    "reduce": (
        *_constants(reduce),
        *(of(mean) for of in (reduce.squared_error, reduce.squared_error_backward) for mean in _CHOICES),
    ),
    "softmax": (
        *_constants(softmax),
        *(
            of(choice)
            for of in (
                softmax.token_logprobs,
                softmax.token_logprobs_backward,
                softmax.cross_entropy,
                softmax.cross_entropy_backward,
            )
            for choice in _CHOICES
        ),
    ),
    "attention": (
        attention.FINITE_OR_NAN,
        *(of(choice) for of in (attention.attention_softmax, attention.attention_softmax_backward) for choice in _CHOICES),
    ),
    "norm": (
        *(norm.layer_norm(*parts) for parts in product(_CHOICES, _CHOICES)),
        *(norm.layer_norm_backward(weight) for weight in _CHOICES),
        *(norm.rms_norm(weight) for weight in _CHOICES),
        *(norm.fused_add_rms_norm(weight, dtype) for weight, dtype in product(_CHOICES, FORMATS)),
        *(norm.rms_norm_backward(weight, residual) for weight, residual in product(_CHOICES, _CHOICES)),
    ),
    "pointwise": _constants(pointwise),
    "optimizer": (
        *_constants(optimizer),
        *(optimizer.sgd(*variant) for variant in product(_CHOICES, _CHOICES, _CHOICES) if variant[0] or not any(variant)),
    ),
}

COLUMN_PROGRAMS: tuple[ColumnProgram, ...] = (
    norm.RMS_NORM_PARAMETERS,
    norm.COLUMN_SUM,
    *(norm.layer_norm_parameters(weight, bias) for weight, bias in product(_CHOICES, _CHOICES) if weight or bias),
)
