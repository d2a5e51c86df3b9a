"""layer_norm, group_norm and rms_norm, with the statistics that torch's own ops return beside the result."""

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from bi_torch.mode.override import Override
from bi_torch.rows import norm
from bi_torch.rows.arguments import FLOATS


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """layer_norm, the mean and 1 / standard deviation of every row."""
    if input.dtype not in FLOATS:
        return NotImplemented
    return norm.native_layer_norm(input, normalized_shape, weight, bias, eps)


OVERRIDES = (Override("native_layer_norm", native_layer_norm, out="native_layer_norm.out"),)
