"""The mode on a GPU: what it replaces has the CPU's bits, forward and backward, and costs the host little."""

import time

import pytest
import torch
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from bi_torch.mode import set_batch_invariant_mode
from tests.arrays import assert_same, draw
from tests.test_mode import Model
from tests.test_mode_overrides import SAMPLES, call

pytestmark = pytest.mark.gpu

NAMES = (
    *(
        "mm",
        "mm.dtype",
        "addmm",
        "baddbmm",
        "addbmm",
        "mv",
        "dot",
        "addr",
        "linear",
        "_grouped_mm",
        "scaled_dot_product_attention",
    ),
    *("sum.dim_IntList", "mean", "prod.dim_int", "var.correction", "std.correction", "norm.Scalar", "amax", "logsumexp"),
    *("_softmax", "_log_softmax_backward_data", "native_layer_norm", "native_layer_norm_backward", "native_group_norm"),
    *("_fused_rms_norm", "cross_entropy_loss", "nll_loss_forward", "nll_loss_backward", "mse_loss", "embedding_dense_backward"),
    *("gelu", "silu_backward", "exp", "rsqrt", "exp2", "pow.Tensor_Tensor", "pow.Tensor_Scalar"),
)
"""One overload of each kind: every program that they rest on is tested for itself."""


@pytest.mark.parametrize("sample", [sample for sample in SAMPLES if sample.name in NAMES], ids=str)
def test_the_bits_of_a_cpu(sample):
    args, options = sample.arguments()
    there, options_there = pytree.tree_map_only(torch.Tensor, torch.Tensor.cuda, (args, options))
    with set_batch_invariant_mode(portable=True):
        for on_gpu, on_cpu in zip(call(sample.name, there, options_there), call(sample.name, args, options), strict=True):
            assert_same(on_gpu.cpu(), on_cpu)


def test_a_model():
    """The backward pass runs on the autograd engine's own thread."""
    torch.manual_seed(0)
    model, ids = Model().cuda(), torch.randint(20, (5, 7), device="cuda")
    with set_batch_invariant_mode():
        batch = model(ids)
        assert_same(batch[2:3].detach(), model(ids[2:3]).detach())
        runs = []
        for _ in range(2):
            model.zero_grad()
            F.nll_loss(model(ids).flatten(0, 1), ids.flatten()).backward()
            runs.append([p.grad.clone() for p in model.parameters()])
    for first, second in zip(*runs, strict=True):
        assert_same(first, second)


CALLS = {
    "mm": lambda x: torch.mm(x, x),
    "linear": lambda x: F.linear(x, x, x[0]),
    "sum": lambda x: x.sum(-1),
    "softmax": lambda x: x.softmax(-1),
    "layer_norm": lambda x: F.layer_norm(x, (64,), x[0], x[0]),
    "silu": F.silu,
    "embedding": lambda x: F.embedding(x[:, 0].long().clamp(0, 9), x),
}


def host_microseconds(function, x):
    """The host's time of a call, at its best."""
    best = float("inf")
    for _ in range(20):
        torch.cuda.synchronize()
        start = time.perf_counter()
        for _ in range(20):
            function(x)
        best = min(best, (time.perf_counter() - start) / 20)
    return best * 1e6


@pytest.mark.parametrize("name", CALLS)
def test_host_overhead(name):
    x = draw(64, 64).cuda()
    stock = host_microseconds(CALLS[name], x)
    with set_batch_invariant_mode(), torch.no_grad():
        ours = host_microseconds(CALLS[name], x)
    assert ours - stock < 25
