"""The mode under what PyTorch puts around a model: vmap and grad, autocast, inference mode, checkpointing, CUDA graphs."""

import pytest
import torch
import torch.nn.functional as F
from torch.func import functional_call, grad, jacrev, vmap
from torch.utils.checkpoint import checkpoint

import bi_torch
from bi_torch.mode import set_batch_invariant_mode
from tests.arrays import assert_same, integers

devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])


@pytest.fixture(autouse=True, scope="module")
def mode():
    with set_batch_invariant_mode():
        yield


def normal(*shape):
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape) + len(shape))).bfloat16()


X, W, B = normal(4, 3, 8), normal(5, 8), normal(5)
IDS = torch.arange(12).view(4, 3) % 5

BATCHED = {
    "mm": (torch.mm, (X, normal(8, 6)), (0, None)),
    "mm, both": (torch.mm, (X, normal(4, 8, 6)), (0, 0)),
    "mm, second": (torch.mm, (normal(3, 8), normal(4, 8, 6)), (None, 0)),
    "addmm": (torch.addmm, (normal(4, 6), X, normal(8, 6)), (0, 0, None)),
    "addmm, bias": (torch.addmm, (normal(4, 3, 6), normal(3, 8), normal(8, 6)), (0, None, None)),
    "bmm": (torch.bmm, (normal(4, 2, 3, 8), normal(2, 8, 3)), (0, None)),
    "mv": (torch.mv, (X, normal(8)), (0, None)),
    "dot": (torch.dot, (normal(4, 8), normal(8)), (0, None)),
    "linear": (F.linear, (X, W, B), (0, None, None)),
    "linear, weights": (F.linear, (X, normal(4, 5, 8), normal(4, 5)), (0, 0, 0)),
    "linear, vectors": (F.linear, (normal(4, 8), W, B), (0, None, None)),
    "einsum": (lambda a, b: torch.einsum("ij,kj->ik", a, b), (X, W), (0, None)),
    "softmax": (lambda x: x.softmax(0), (X,), (0,)),
    "sum": (lambda x: x.sum(0), (X,), (0,)),
    "mean": (lambda x: x.mean(), (normal(3, 4, 8),), (1,)),
    "var": (lambda x: x.var(-1), (X,), (0,)),
    "logsumexp": (lambda x: x.logsumexp(-1), (X,), (0,)),
    "layer_norm": (lambda x, w: F.layer_norm(x, (8,), w, w), (X, normal(8)), (0, None)),
    "layer_norm, weights": (lambda x, w: F.layer_norm(x, (8,), w, w), (X, normal(4, 8)), (0, 0)),
    "rms_norm": (lambda x, w: F.rms_norm(x, (8,), w, 1e-6), (X, normal(8)), (0, None)),
    "silu": (F.silu, (X,), (0,)),
    "gelu": (F.gelu, (normal(3, 8, 4),), (2,)),
    "attention": (
        lambda q, k: F.scaled_dot_product_attention(q, k, k, is_causal=True),
        (normal(4, 2, 3, 8), normal(2, 3, 8)),
        (0, None),
    ),
    "embedding": (F.embedding, (IDS, W), (0, None)),
    "cross_entropy": (F.cross_entropy, (X, IDS), (0, 0)),
    "gradient of linear": (grad(lambda w, x: F.linear(x, w, B).float().square().sum()), (W, X), (None, 0)),
    "gradient of a layer": (
        grad(lambda x, w: (F.layer_norm(F.linear(x, w), (5,), B, B).softmax(-1) * B).sum()),
        (X, W),
        (0, None),
    ),
    "gradient of attention": (grad(lambda q: F.scaled_dot_product_attention(q, q, q).sum()), (normal(4, 2, 3, 8),), (0,)),
    "gradient of embedding": (grad(lambda w, ids: (F.embedding(ids, w, 1) * X[0, 0]).square().sum()), (W, IDS), (None, 0)),
    "gradient of embeddings": (grad(lambda w: (F.embedding(IDS, w) * X).square().sum()), (normal(4, 5, 8),), (0,)),
    "gradient of cross_entropy": (grad(lambda x, ids: F.cross_entropy(x, ids)), (X, IDS), (0, 0)),
}
"""A function, its arguments, and the dimensions that vmap takes; the first argument that has one has 4 of it."""


def assert_vmap_is_a_loop(name, device):
    function, arguments, dims = BATCHED[name]
    arguments = [x.to(device) for x in arguments]
    each = [function(*(x if d is None else x.select(d, i) for x, d in zip(arguments, dims, strict=True))) for i in range(4)]
    assert_same(vmap(function, dims)(*arguments), torch.stack(each))


@pytest.mark.parametrize("name", BATCHED)
def test_vmap_has_the_bits_of_a_loop(name):
    assert_vmap_is_a_loop(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["linear", "layer_norm, weights", "attention", "gradient of attention"])
def test_vmap_has_the_bits_of_a_loop_on_a_gpu(name):
    assert_vmap_is_a_loop(name, "cuda")


@pytest.mark.parametrize("function", [F.linear, torch.addmm], ids=["linear", "addmm"])
def test_a_vmap_inside_a_vmap(function):
    arguments = (X[..., None, :], W, B) if function is F.linear else (normal(4, 3, 2, 6), normal(4, 3, 2, 8), normal(8, 6))
    dims = (0, *(0 if function is torch.addmm and i == 1 else None for i in (1, 2)))
    each = [torch.stack([function(*(x[i][j] if d == 0 else x for x, d in zip(arguments, dims, strict=True))) for j in range(3)])
            for i in range(4)]  # fmt: skip
    assert_same(vmap(vmap(function, dims), dims)(*arguments), torch.stack(each))


def test_gradients_of_torch_func_have_the_bits_of_backward():
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 16), torch.nn.SiLU(), torch.nn.LayerNorm(16), torch.nn.Linear(16, 5)
    ).bfloat16()
    parameters = dict(model.named_parameters())

    def loss(parameters):
        return F.cross_entropy(functional_call(model, parameters, X[0]), IDS[0])

    loss(parameters).backward()
    gradients = grad(loss)({name: p.detach() for name, p in parameters.items()})
    for name, p in parameters.items():
        assert_same(gradients[name], p.grad)


def test_a_gradient_through_a_vmap():
    w = W.clone().requires_grad_()
    torch.stack([F.linear(x, w, B).float().square() for x in X]).sum().backward()
    expected = grad(lambda w: torch.stack([F.linear(x, w, B).float().square() for x in X]).sum())(W)
    assert_same(w.grad, expected)
    actual = grad(lambda w: vmap(lambda x: F.linear(x, w, B).float().square())(X).sum())(W)
    assert actual.abs().sum() > 0
    one_product = grad(lambda w: F.linear(X, w, B).float().square().sum())(W)
    assert_same(actual, one_product)


@devices
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_gradient_of_an_embedding_is_a_sum_in_the_order_of_tokens(dtype, device):
    """Torch's own formula comes to the mode's kernel; the cotangents cancel."""
    g = torch.cat([normal(4, 3, 8), normal(4, 3, 8) * 2**12, normal(4, 3, 8)]).to(device, dtype)
    ids, padding = torch.cat([IDS, IDS, IDS % 2]).to(device), 3
    weights = [W.to(device, dtype, copy=True).requires_grad_() for _ in range(2)]
    for function, w in zip((F.embedding, bi_torch.embedding), weights, strict=True):
        y = function(ids, w, padding)
        y.backward(g)
        assert_same(y.detach(), W.to(device, dtype)[ids])
    assert_same(weights[0].grad, weights[1].grad)
    with set_batch_invariant_mode(False):
        w = W.to(device, dtype, copy=True).requires_grad_()
        F.embedding(ids, w, padding).backward(g)
    assert w.grad.abs().sum() > 0
    torch.testing.assert_close(weights[0].grad, w.grad, rtol=0.02, atol=float(g.abs().max()) * 0.02)


def test_jacobians():
    x = normal(8).float()
    jacobian = jacrev(lambda x: F.linear(x, W.float()))(x)
    assert_same(jacobian, W.float())


@devices
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_autocast_casts_as_without_the_mode(device, dtype):
    dtype = getattr(torch, dtype)
    x, w = normal(2, 3, 8).float().to(device), normal(8, 8).float().to(device)
    functions = {
        "linear": lambda x, w: F.linear(x, w, w[0]),
        "matmul": torch.matmul,
        "mm": lambda x, w: torch.mm(x[0], w),
        "addmm": lambda x, w: torch.addmm(x[0], x[1], w),
        "bmm": lambda x, w: torch.bmm(x, w.expand(2, 8, 8)),
        "baddbmm": lambda x, w: torch.baddbmm(x, x, w.expand(2, 8, 8)),
        "einsum": lambda x, w: torch.einsum("bij,jk->bik", x, w),
        "attention": lambda x, w: F.scaled_dot_product_attention(x, x, x),
        "softmax": lambda x, w: x.softmax(-1),
        "layer_norm": lambda x, w: F.layer_norm(x, (8,), w[0], w[1]),
        "rms_norm": lambda x, w: F.rms_norm(x, (8,), w[0]),
        "sum": lambda x, w: x.sum(-1),
        "mean": lambda x, w: x.mean(-1),
        "gelu": lambda x, w: F.gelu(x),
        "layer": lambda x, w: F.layer_norm(F.silu(F.linear(x, w)), (8,), w[0]).softmax(-1),
        "cross_entropy": lambda x, w: F.cross_entropy(F.linear(x[0], w), torch.arange(3, device=x.device)),
    }
    for name, function in functions.items():
        with torch.autocast(device, dtype):
            ours = function(x, w)
            with set_batch_invariant_mode(False):
                stock = function(x, w)
        assert ours.dtype == stock.dtype, name
        torch.testing.assert_close(ours, stock, rtol=0.05, atol=0.05, msg=name)
    with torch.autocast(device, dtype):
        assert_same(functions["linear"](x, w), F.linear(x.to(dtype), w.to(dtype), w[0].to(dtype)))


@devices
def test_gradients_under_autocast(device):
    x, w = normal(3, 8).float().to(device), normal(5, 8).float().to(device).requires_grad_()
    with torch.autocast(device, torch.bfloat16):
        y = F.linear(x, w).softmax(-1)
    y.sum().backward()
    alone = w.grad.clone()
    w.grad = None
    with torch.autocast(device, torch.bfloat16):
        z = F.linear(x, w).softmax(-1)
    assert_same(y.detach(), z.detach())
    z.sum().backward()
    assert w.grad.dtype == torch.float32
    assert_same(w.grad, alone)


class Layer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = torch.nn.RMSNorm(8), torch.nn.Linear(8, 16), torch.nn.Linear(16, 8)

    def forward(self, x):
        h = self.norm(x)
        return x + F.scaled_dot_product_attention(h, h, h, is_causal=True) + self.down(F.silu(self.up(h)))


def layer(device):
    torch.manual_seed(0)
    return Layer().to(device, torch.bfloat16)


@devices
def test_inference_mode_has_the_bits_of_no_grad(device):
    model, x = layer(device), X.to(device)
    with torch.no_grad():
        expected = model(x)
    with torch.inference_mode():
        actual = model(x)
        one = model(x[2:3])
    assert_same(actual, expected)
    assert_same(one, expected[2:3])
    assert_same(model(x).detach(), expected)


@devices
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_has_the_bits_of_keeping(device, reentrant):
    model, x = layer(device), X.to(device)

    def gradients(call):
        model.zero_grad()
        start = x.clone().requires_grad_()
        call(start).float().square().sum().backward()
        return [start.grad, *(p.grad for p in model.parameters())]

    expected = gradients(model)
    actual = gradients(lambda x: checkpoint(model, x, use_reentrant=reentrant))
    for a, e in zip(actual, expected, strict=True):
        assert torch.equal(integers(a), integers(e))


@pytest.mark.gpu
def test_a_captured_cuda_graph_replays_the_bits_of_eager():
    model, x = layer("cuda"), X.cuda()
    static = x.clone()
    with torch.no_grad():
        expected = model(x), model(x.flip(0))
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            model(static)  # kernels are compiled before the capture
        torch.cuda.current_stream().wait_stream(stream)
        captured = torch.cuda.CUDAGraph()
        with torch.cuda.graph(captured):
            y = model(static)
    for batch, wanted in zip((x, x.flip(0)), expected, strict=True):
        static.copy_(batch)
        captured.replay()
        assert_same(y, wanted)


@pytest.mark.gpu
def test_a_captured_step_of_training_replays_the_bits_of_eager():
    model, x = layer("cuda"), X.cuda()

    def step():
        model.zero_grad(set_to_none=True)
        loss = model(x).float().square().sum()
        loss.backward()
        return loss

    expected = [step().detach().clone(), *(p.grad.clone() for p in model.parameters())]
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        step()
    torch.cuda.current_stream().wait_stream(stream)
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        loss = step()
    captured.replay()
    for actual, wanted in zip([loss.detach(), *(p.grad for p in model.parameters())], expected, strict=True):
        assert_same(actual, wanted)
