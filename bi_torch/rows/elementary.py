"""Elementary functions that only the portable mode calls; torch's own formulas are their gradients."""

from collections.abc import Callable

import torch
from torch import Tensor

from bi_torch.rows.library import RowOp
from shared_specs.programs import pointwise as programs
from shared_specs.rows import RowProgram


def _function(program: RowProgram) -> Callable[[Tensor], Tensor]:
    op = RowOp(f"{program.name}(Tensor x, ScalarType dtype) -> Tensor y", program)

    def run(input: Tensor) -> Tensor:
        return op(input.reshape(1, input.numel()), input.dtype).reshape(input.shape)

    return run


FUNCTIONS = {
    program.name: _function(program)
    for program in (programs.ERFC, programs.EXP2, programs.EXPM1, programs.LOG1P, programs.LOG2)
}
"""Each of a tensor of one of the contract's dtypes, which the result has too."""

_pow = RowOp("pow(Tensor x1, Tensor x2, ScalarType dtype) -> Tensor y", programs.POW)


def power(base: Tensor | float, exponent: Tensor | float, dtype: torch.dtype) -> Tensor:
    """base ** exponent of float32 values, of which one is a tensor and both broadcast; rounded once to `dtype`."""
    device = next(x.device for x in (base, exponent) if isinstance(x, Tensor))
    values = (torch.as_tensor(x, device=device).to(torch.float32) for x in (base, exponent))
    x, y = torch.broadcast_tensors(*values)
    return _pow(x.reshape(1, x.numel()), y.reshape(1, y.numel()), dtype).reshape(x.shape)
