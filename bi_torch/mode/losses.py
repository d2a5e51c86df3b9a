"""Losses that torch reduces inside their kernels, and the gradient of embeddings, a sum over tokens.

An embedding itself copies rows: torch's kernel does, and torch's formula comes to the gradient here.

Losses that torch composes (l1, smooth l1, huber, binary cross entropy, kl_div) reach their mean or sum through the overrides of
those.
"""

from typing import Any, Literal

import torch
from torch import Tensor

from bi_torch.mode.override import Override
from bi_torch.rows import embedding as embeddings
from bi_torch.rows import reduce, softmax
from bi_torch.rows.arguments import FLOATS, IDS

Reduction = Literal["none", "mean", "sum"]
REDUCTIONS: tuple[Reduction, ...] = ("none", "mean", "sum")
"""By torch's numbers."""


def cross_entropy_loss(
    self: Tensor,
    target: Tensor,
    weight: Tensor | None = None,
    reduction: int = 1,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
) -> Any:
    """Cross entropy of classes; with class weights or probabilities it is torch's composition of ops that are replaced.

    So it is under autocast, which says for each of those in what dtype it runs.
    """
    if self.dtype not in FLOATS or target.dtype not in IDS or weight is not None or torch.is_autocast_enabled(self.device.type):
        return NotImplemented
    how = REDUCTIONS[reduction]
    return softmax.cross_entropy(self, target, ignore_index=ignore_index, reduction=how, label_smoothing=label_smoothing)


def nll_loss_forward(self: Tensor, target: Tensor, weight: Tensor | None, reduction: int, ignore_index: int) -> Any:
    """The loss, and the sum of the weights that it was divided by."""
    if self.dtype not in FLOATS or target.dtype not in IDS:
        return NotImplemented
    loss, total = softmax.nll_loss(self, target, weight, ignore_index=ignore_index, reduction=REDUCTIONS[reduction])
    return loss, total.to(self.dtype) if reduction else self.new_zeros(())


def mse_loss(self: Tensor, target: Tensor, reduction: int = 1) -> Any:
    """The squared error of tensors that broadcast."""
    dtype = torch.result_type(self, target)
    if REDUCTIONS[reduction] == "none" or dtype not in FLOATS:
        return NotImplemented
    x, y = torch.broadcast_tensors(self.to(dtype), target.to(dtype))
    return reduce.squared_error(x, y, REDUCTIONS[reduction] == "mean")


def nll_loss_backward(
    grad_output: Tensor,
    self: Tensor,
    target: Tensor,
    weight: Tensor | None,
    reduction: int,
    ignore_index: int,
    total_weight: Tensor,
) -> Any:
    """The gradient of the losses' input: -weight times the cotangent at the class, 0 elsewhere."""
    if self.dtype not in FLOATS or target.dtype not in IDS:
        return NotImplemented
    divisor = total_weight if REDUCTIONS[reduction] == "mean" else None
    return softmax.nll_loss_backward(grad_output, self, target, weight, ignore_index, divisor)


def mse_loss_backward(grad_output: Tensor, self: Tensor, target: Tensor, reduction: int) -> Any:
    """2 (self - target) times the cotangent, which is divided by the number of elements for a mean; in float32."""
    if self.dtype not in FLOATS or target.dtype not in FLOATS:
        return NotImplemented
    difference = self.to(torch.float32) - target.to(torch.float32)
    twice = 2 * grad_output.to(torch.float32)
    if REDUCTIONS[reduction] == "mean":
        twice = twice / torch.full((), difference.numel(), dtype=torch.float32, device=twice.device)
    return (twice * difference).to(self.dtype)


def embedding_dense_backward(
    grad_output: Tensor, indices: Tensor, num_weights: int, padding_idx: int, scale_grad_by_freq: bool
) -> Any:
    """The gradient of the weight of an embedding: of each row the sum over its tokens in their order."""
    if grad_output.dtype not in FLOATS or scale_grad_by_freq:
        return NotImplemented
    return embeddings.embedding_backward(grad_output, indices, num_weights, padding_idx)


OVERRIDES = (
    Override("cross_entropy_loss", cross_entropy_loss),
    Override("nll_loss_forward", nll_loss_forward, out="nll_loss_forward.output"),
    Override("nll_loss2d_forward", nll_loss_forward, out="nll_loss2d_forward.output"),
    Override("nll_loss_backward", nll_loss_backward, out="nll_loss_backward.grad_input", autograd=False),
    Override("nll_loss2d_backward", nll_loss_backward, out="nll_loss2d_backward.grad_input", autograd=False),
    Override("mse_loss", mse_loss, out="mse_loss.out"),
    Override("mse_loss_backward", mse_loss_backward, out="mse_loss_backward.grad_input", autograd=False),
    Override("embedding_dense_backward", embedding_dense_backward, out="embedding_dense_backward.out", autograd=False),
)
