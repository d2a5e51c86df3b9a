"""layer_norm, group_norm and rms_norm, with the statistics that torch's ops return beside the result, and their gradients."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bi_torch.mode.override import Override
from bi_torch.rows import norm, reduce
from bi_torch.rows.arguments import FLOATS


def layer_norm(
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enable: bool = True,
) -> Any:
    """(input - mean) / sqrt(variance + eps) * weight + bias."""
    return norm.layer_norm(input, normalized_shape, weight, bias, eps) if input.dtype in FLOATS else NotImplemented


def native_layer_norm(
    input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, bias: Tensor | None, eps: float
) -> Any:
    """layer_norm, the mean and 1 / standard deviation of every row."""
    return norm.native_layer_norm(input, normalized_shape, weight, bias, eps) if input.dtype in FLOATS else NotImplemented


def native_layer_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    output_mask: Sequence[bool],
) -> Any:
    """The gradients of input, weight and bias that the mask asks for."""
    if input.dtype not in FLOATS:
        return NotImplemented
    needs = {name for name, wanted in zip(("x", "weight", "bias"), output_mask, strict=True) if wanted}
    return norm.native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, needs)


def rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None = None, eps: float | None = None) -> Any:
    """input / sqrt(mean of squares + eps) * weight."""
    return norm.rms_norm(input, normalized_shape, weight, eps) if input.dtype in FLOATS else NotImplemented


def fused_rms_norm(input: Tensor, normalized_shape: Sequence[int], weight: Tensor | None, eps: float | None) -> Any:
    """rms_norm and 1 / root mean square of every row."""
    return norm.fused_rms_norm(input, normalized_shape, weight, eps) if input.dtype in FLOATS else NotImplemented


def fused_rms_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    normalized_shape: Sequence[int],
    rstd: Tensor,
    weight: Tensor | None,
    output_mask: Sequence[bool],
) -> Any:
    """The gradients of input and weight that the mask asks for."""
    if input.dtype not in FLOATS:
        return NotImplemented
    needs = {name for name, wanted in zip(("x", "weight"), output_mask, strict=True) if wanted}
    return norm.fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, needs)


def native_group_norm(
    input: Tensor, weight: Tensor | None, bias: Tensor | None, N: int, C: int, HxW: int, group: int, eps: float
) -> Any:
    """group_norm [N, C, *], the mean and 1 / standard deviation [N, group] of every group.

    A group is a row of layer_norm in float32; weight and bias are a product and a sum after it, and then comes the rounding.
    """
    if input.dtype not in FLOATS:
        return NotImplemented
    rows = input.reshape(N * group, C // group * HxW)
    y, mean, rstd = norm.native_layer_norm(rows.to(torch.float32), rows.shape[1:], None, None, eps)
    y = y.reshape(N, C, HxW)
    if weight is not None:
        y = y * weight.to(torch.float32)[:, None]
    if bias is not None:
        y = y + bias.to(torch.float32)[:, None]
    return y.to(input.dtype).reshape(input.shape), mean.reshape(N, group), rstd.reshape(N, group)


def native_group_norm_backward(
    grad_out: Tensor,
    input: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor | None,
    N: int,
    C: int,
    HxW: int,
    group: int,
    output_mask: Sequence[bool],
) -> Any:
    """The gradients of input, weight and bias that the mask asks for."""
    if input.dtype not in FLOATS:
        return NotImplemented
    g, x = (tensor.to(torch.float32).reshape(N, C, HxW) for tensor in (grad_out, input))
    mean, rstd = mean.to(torch.float32).reshape(N * group), rstd.to(torch.float32).reshape(N * group)
    dtype = input.dtype if weight is None else weight.dtype
    dx = dweight = dbias = None
    if output_mask[0]:
        scaled = g if weight is None else g * weight.to(torch.float32)[:, None]
        scaled, rows = (tensor.reshape(N * group, C // group * HxW) for tensor in (scaled, x))
        dx, *_ = norm.native_layer_norm_backward(scaled, rows, rows.shape[1:], mean, rstd, None, None, {"x"})
        assert dx is not None
        dx = dx.to(input.dtype).reshape(input.shape)
    if output_mask[1]:
        centred = x.reshape(N, group, -1) - mean.reshape(N, group, 1)
        dweight = reduce.sum(g * (centred * rstd.reshape(N, group, 1)).reshape(N, C, HxW), (0, 2)).to(dtype)
    if output_mask[2]:
        dbias = reduce.sum(g, (0, 2)).to(dtype)
    return dx, dweight, dbias


OVERRIDES = (
    Override("layer_norm", layer_norm),
    Override("native_layer_norm", native_layer_norm, out="native_layer_norm.out"),
    Override("native_layer_norm_backward", native_layer_norm_backward, out="native_layer_norm_backward.out", autograd=False),
    Override("native_group_norm", native_group_norm, out="native_group_norm.out"),
    Override("native_group_norm_backward", native_group_norm_backward, out="native_group_norm_backward.out", autograd=False),
    Override("rms_norm", rms_norm),
    Override("_fused_rms_norm", fused_rms_norm),
    Override("_fused_rms_norm_backward", fused_rms_norm_backward, autograd=False),
)
