"""Every row and column program in every variant, inputs for them, and the reference model on those."""

from itertools import product
from types import ModuleType

import numpy as np
import torch

from shared_specs.formats import float_format
from shared_specs.inputs import operand_bits
from shared_specs.programs import norm, optimizer, pointwise, reduce, softmax
from shared_specs.reference import rows as reference
from shared_specs.rows import ColumnProgram, RowProgram
from tests.arrays import DTYPES, NAMES, to_bits, to_torch

BOOLS = (False, True)


def _constants(module: ModuleType, kind: type) -> list:
    return [value for value in vars(module).values() if isinstance(value, kind)]


ROW_PROGRAMS: tuple[RowProgram, ...] = (
    *(program for module in (reduce, softmax, norm, pointwise, optimizer) for program in _constants(module, RowProgram)),
    *(norm.layer_norm(*parts) for parts in product(BOOLS, BOOLS)),
    *(norm.layer_norm_backward(weight) for weight in BOOLS),
    *(norm.rms_norm(weight) for weight in BOOLS),
    *(norm.fused_add_rms_norm(weight, dtype) for weight, dtype in product(BOOLS, DTYPES)),
    *(norm.rms_norm_backward(weight, residual) for weight, residual in product(BOOLS, BOOLS)),
    *(softmax.token_logprobs(temperature) for temperature in BOOLS),
    *(softmax.token_logprobs_backward(temperature) for temperature in BOOLS),
    *(softmax.cross_entropy(smoothing) for smoothing in BOOLS),
    *(softmax.cross_entropy_backward(smoothing) for smoothing in BOOLS),
    *(optimizer.sgd(*variant) for variant in product(BOOLS, BOOLS, BOOLS) if variant[0] or not any(variant)),
)

COLUMN_PROGRAMS: tuple[ColumnProgram, ...] = (
    norm.RMS_NORM_PARAMETERS,
    norm.COLUMN_SUM,
    *(norm.layer_norm_parameters(weight, bias) for weight, bias in product(BOOLS, BOOLS) if weight or bias),
)

SCALARS = {
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


def draw_inputs(
    program: RowProgram | ColumnProgram, rows: int, n: int, dtype: str, kind: str = "normal", seed: int = 0
) -> dict[str, torch.Tensor]:
    """CPU tensors; ids lie in -1..n, some of them outside the row."""

    def floats(shape: tuple[int, ...], name: str) -> torch.Tensor:
        fmt = float_format(name)
        return to_torch(operand_bits(kind, shape, fmt, seed + len(inputs)), fmt)

    inputs: dict[str, torch.Tensor] = {}
    for name in program.elements:
        inputs[name] = floats((rows, n), dtype)
    for name in program.columns:
        inputs[name] = floats((n,), dtype)
    for name in program.rows:
        inputs[name] = floats((rows,), "float32")
    for name in getattr(program, "ids", ()):
        inputs[name] = torch.from_numpy(np.random.default_rng(seed).integers(-1, n + 1, rows))
    return inputs


def expected(
    program: RowProgram | ColumnProgram,
    inputs: dict[str, torch.Tensor],
    out_dtypes: dict[str, torch.dtype],
    scalars: dict[str, float | int] = SCALARS,
) -> dict[str, torch.Tensor]:
    """The reference model's outputs; those without a dtype are float32."""
    values = {
        name: x.numpy().astype(np.int32)
        if name in getattr(program, "ids", ())
        else float_format(NAMES[x.dtype]).decode(to_bits(x))
        for name, x in inputs.items()
    }
    run = reference.run_columns if isinstance(program, ColumnProgram) else reference.run_rows
    result = {}
    for name, value in run(program, values, scalars).items():
        fmt = float_format(NAMES[out_dtypes.get(name, torch.float32)])
        result[name] = to_torch(fmt.encode(value), fmt)
    return result
