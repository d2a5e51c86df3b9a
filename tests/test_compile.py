"""torch.compile under the mode: the bits of eager, no product or reduction of the compiler's own, a guard, caches."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.decorators import skip
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from torch._guards import GuardsContext
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.utils import fresh_cache, run_and_get_code
from torch.utils.checkpoint import checkpoint

from bi_torch.mode import (
    UncoveredOperationError,
    UncoveredOperationWarning,
    compiler,
    coverage,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    graph,
    set_batch_invariant_mode,
)
from tests.arrays import assert_same, integers

pytestmark = pytest.mark.usefixtures("inductor", "fresh_dynamo")
devices = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])

OWN_KERNELS = re.compile(
    r"extern_kernels\.\w+|aten\.(?:mm|addmm|bmm|baddbmm|mean|sum|_softmax|native_layer_norm|_fused_rms_norm)\b"
    r"|mkldnn\.\w+|tmp_acc\w*|welford\w*|tl\.(?:sum|reduce|dot)|triton_helpers\.(?:any|max2|promote_to_tensor)"
)
"""Products and reductions that Inductor generates, or calls past the mode."""


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


class Block(nn.Module):
    """A decoder layer with a bit of everything that a model takes: composite operations, in-place ones, an einsum."""

    def __init__(self, width=32, vocabulary=50, heads=2):
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm, self.qkv = nn.RMSNorm(width, eps=1e-6), nn.Linear(width, 3 * width)
        self.norm2, self.gate, self.up = nn.LayerNorm(width), nn.Linear(width, 2 * width, False), nn.Linear(width, 2 * width)
        self.down, self.head = nn.Linear(2 * width, width), nn.Linear(width, vocabulary)

    def forward(self, ids):
        x = self.embedding(ids)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.qkv(self.norm(x)).chunk(3, -1))
        x = x + F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2) * 0.7
        h = self.norm2(x)
        x = x + self.down(F.silu(self.gate(h), inplace=True) * F.gelu(self.up(h)))
        x = x + torch.einsum("bti,bsi->bts", x, torch.tanh(x)) @ x.softmax(-1)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-5)
        return self.head(x).log_softmax(-1)


def step(model, ids):
    """Log-probabilities, loss and gradients of one step of training."""
    model.zero_grad()
    y = model(ids)
    loss = F.nll_loss(y.flatten(0, 1), ids.flatten())
    loss.backward()
    return y.detach(), loss.detach(), *(p.grad.clone() for p in model.parameters())


def function(x, w):
    return F.linear(x, w).softmax(-1)


def assert_all_same(actual, expected):
    assert len(actual) == len(expected)
    for x, y in zip(actual, expected, strict=True):
        assert x.dtype == y.dtype
        assert torch.equal(integers(x), integers(y))


@devices
@pytest.mark.parametrize("portable", [False, True])
def test_a_step_of_training_has_the_bits_of_eager_and_no_kernel_of_the_compilers_own(device, portable):
    model = Block().to(device, torch.bfloat16)
    ids = torch.randint(0, 50, (3, 5), device=device)
    with set_batch_invariant_mode(portable=portable):
        expected = step(model, ids)
        actual, codes = run_and_get_code(step, torch.compile(model), ids)
    assert_all_same(actual, expected)
    assert len(codes) == 2  # forward and backward
    for code in codes:
        assert "torch.ops.bi_torch.gemm" in code
        assert not OWN_KERNELS.findall(code)


def test_without_the_mode_the_compiler_has_such_kernels():
    with torch.no_grad():
        _, codes = run_and_get_code(torch.compile(function), torch.randn(3, 16), torch.randn(5, 16))
    assert len(set(OWN_KERNELS.findall("".join(codes)))) >= 2


CHAINS = {
    "contraction": lambda x, y: (x * y + x) * y - y * 0.7 + x / 3,
    "alpha": lambda x, y: torch.add(x, y, alpha=0.3) - torch.rsub(x, y, alpha=0.3),
    "division": lambda x, y: x / y + 3 / x + x / 0.25,
    "root": lambda x, y: (x.abs().sqrt() + y * y).sqrt() / (x + 1.5),
    "scalars": lambda x, y: (x + 0.1) * 0.3 - (0.7 - y) * 257,
    "zeros": lambda x, y: torch.stack([(x + 0.0) * 1.0, 0.0 - y, -(x - x), x.relu(), x.clamp(-0.5, 0.0), x * 0.0]),
    "selections": lambda x, y: torch.where(x > 0.1, x.clamp(-0.3, 0.1), y.floor() + (x * 7).trunc() - y.ceil()),
    "conversions": lambda x, y: (x.bfloat16().float() + y.half().float(), (x * 1.7).bfloat16(), (x.double() * y).to(x.dtype)),
    "functions": lambda x, y: torch.exp(x * y) + torch.atan(x) * torch.sigmoid(y) + F.softplus(x) + x.abs().pow(1.5),
    "powers": lambda x, y: (x**2 + y.square() + x.pow(3) + x**1, (x > y).long() ** 2.0),
    "fused": lambda x, y: torch.addcmul(x, x, y, value=0.3) + torch.lerp(x, y, 0.3) + F.leaky_relu(x, 0.1) + x.reciprocal(),
    "moves": lambda x, y: F.pad(torch.cat([x * 1.1, y + 2]), (1, 2)).flip(0) + torch.full_like(x[:1], 0.1),
    "an empty part": lambda x, y: torch.cat([x.new_empty(0), x[None] * 1.1, y[None]]),
    "masks": lambda x, y: ((x * y)[None, :].expand(5, 71).tril(), x.masked_fill(y > 0, -1e4)),
    "integers": lambda x, y: (torch.arange(71, device=x.device) // 3 * 2 + (x > 0).long(), (x > y).sum()),
    "sequences": lambda x, y: (
        torch.arange(0, 1, 0.07, device=x.device) * x[0],
        torch.linspace(0, 1, 10, device=x.device) / y[0],
    ),
    "scalar tensor": lambda x, y: x * torch.tensor(0.1, device=x.device),
}
"""Elementwise programs; 71 elements are some vectors and a tail."""


@pytest.mark.parametrize(
    ("device", "dtype"),
    [
        ("cpu", "float32"),
        ("cpu", "bfloat16"),
        *(pytest.param("cuda", dtype, marks=pytest.mark.gpu) for dtype in ("float32", "bfloat16")),
    ],
)
def test_arithmetic_has_the_bits_of_eager(device, dtype):
    x, y = torch.randn(71), torch.randn(71)
    x[::7], y[3::7], x[5::11] = 0.0, -0.0, -0.0
    x[2::13] *= 1e-30
    y[2::13] *= 1e-12
    x[4::17] *= 1e20
    x, y = x.to(device, getattr(torch, dtype)), y.to(device, getattr(torch, dtype))

    few = ("contraction", "scalars", "conversions", "moves", "an empty part", "scalar tensor")  # most others are calls on a CPU
    names = few if (device, dtype) == ("cpu", "bfloat16") else CHAINS

    def chains(x, y):
        return {name: CHAINS[name](x, y) for name in names}

    with set_batch_invariant_mode(), torch.no_grad():
        expected = chains(x, y)
        actual = torch.compile(chains)(x, y)
    for name in names:
        pairs = zip(*(r[name] if isinstance(r[name], tuple) else (r[name],) for r in (actual, expected)), strict=True)
        for a, e in pairs:
            assert a.dtype == e.dtype
            ok = a.isnan() & e.isnan() | (integers(a) == integers(e)) if a.is_floating_point() else a == e
            assert ok.all(), (name, a[~ok], e[~ok])


@devices
def test_every_batch_size_after_the_first_has_the_same_rows_and_no_compilation(device):
    model = Block().to(device, torch.bfloat16)
    ids = torch.randint(0, 50, (7, 5), device=device)
    counter = CompileCounterWithBackend("inductor")
    with set_batch_invariant_mode(), torch.no_grad():
        expected = model(ids)
        compiled = torch.compile(model, backend=counter)
        for rows in (slice(2, 5), slice(0, 7), slice(1, 3), slice(3, 7)):
            batch = ids[rows].clone()
            torch._dynamo.mark_dynamic(batch, 0)
            assert_same(compiled(batch), expected[rows])
        assert counter.frame_count == 1
        assert_same(compiled(ids[4:5]), expected[4:5])


@devices
def test_a_backward_pass_after_the_mode_was_left_is_the_one_that_was_traced(device):
    model = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)).to(device, torch.bfloat16)
    x = torch.randn(3, 16, device=device, dtype=torch.bfloat16)

    def gradients(model, backward):
        model.zero_grad()
        with set_batch_invariant_mode():
            loss = model(x).float().square().sum()
            if backward == "inside":
                loss.backward()
        if backward == "outside":
            loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    expected = gradients(model, "inside")
    actual, codes = run_and_get_code(gradients, torch.compile(model), "outside")
    assert_all_same(actual, expected)
    assert not OWN_KERNELS.findall("".join(codes))


@devices
def test_autocast_inference_mode_and_checkpointing(device):
    model = Block().to(device)
    ids = torch.randint(0, 50, (2, 5), device=device)

    def forward(model):
        with torch.autocast(device, torch.bfloat16):
            return model(ids)

    def checkpointed(ids):
        return checkpoint(model, ids, use_reentrant=False)

    with set_batch_invariant_mode():
        compiled = torch.compile(model, backend="aot_eager")
        assert_same(forward(compiled).detach(), forward(model).detach())
        model.to(torch.bfloat16)
        with torch.inference_mode():
            assert_same(compiled(ids), model(ids))
        expected = step(model, ids)
        model.zero_grad()
        y = torch.compile(checkpointed, backend="aot_eager")(ids)
        F.nll_loss(y.flatten(0, 1), ids.flatten()).backward()
        assert_all_same([y.detach(), *(p.grad for p in model.parameters())], [expected[0], *expected[2:]])


@pytest.mark.gpu
def test_cuda_graphs_of_the_compiler():
    model = Block().to("cuda", torch.bfloat16)
    ids = torch.randint(0, 50, (3, 5), device="cuda")
    with set_batch_invariant_mode(), torch.no_grad():
        compiled = torch.compile(model, mode="reduce-overhead")
        for batch in (ids, ids.flip(0), ids.flip(1), ids):  # warm-up, capture, replays
            assert_same(compiled(batch).clone(), model(batch))


# -------------------------------------------------------------------------------------------------------------- the guard


def test_the_mode_is_a_guard_and_code_is_found_again():
    x, w = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter)

    def run(compilations, **arguments):
        with set_batch_invariant_mode(**arguments):
            assert_same(compiled(x, w), function(x, w))
        assert counter.frame_count == compilations

    run(1)
    run(2, enabled=False)
    run(3, portable=True)
    run(4, on_uncovered="warn")
    run(4)
    run(4, enabled=False)
    run(4, portable=True)
    enable_batch_invariant_mode()
    try:
        assert_same(compiled(x, w), function(x, w))
    finally:
        disable_batch_invariant_mode()
    assert_same(compiled(x, w), function(x, w))
    assert counter.frame_count == 4


def test_what_was_compiled_before_the_mode_was_first_used_is_compiled_again(monkeypatch):
    monkeypatch.setattr(compiler, "_installed", False)
    monkeypatch.setattr(GuardsContext, "__init__", GuardsContext.__init__.__wrapped__)
    x, w = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, backend=counter)
    compiled(x, w)
    with set_batch_invariant_mode():
        assert_same(compiled(x, w), function(x, w))
    assert counter.frame_count == 2


def test_a_region_inside_a_compiled_function_is_respected():
    x, w = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()

    def outer(x, w):
        stock = function(x, w)
        with set_batch_invariant_mode():
            ours = function(x, w)
        return stock, ours, function(x, w)

    expected = outer(x, w)
    compiled = torch.compile(outer, backend="aot_eager")
    assert_all_same(compiled(x, w), expected)
    assert_all_same(compiled(x, w), expected)


def test_graphs_cached_on_disk_know_the_mode():
    x = torch.linspace(-8, 8, 64)

    def run(hits, **arguments):
        torch._dynamo.reset()
        with set_batch_invariant_mode(**arguments), torch.no_grad():
            actual = torch.compile(torch.exp)(x)
            assert arguments == {"enabled": False} or torch.equal(actual, torch.exp(x))
        assert counters["aot_autograd"]["autograd_cache_hit"] == hits
        return actual

    settings = {"fx_graph_cache": True, "fx_graph_remote_cache": False}
    with fresh_cache(), config.patch(settings), functorch_config.patch(enable_autograd_cache=True):
        counters.clear()
        assert not torch.equal(run(0), run(0, portable=True))
        run(0, enabled=False)
        run(1, portable=True)
        run(2)


# ------------------------------------------------------------------------------------------- what is not covered, and passes


def test_an_uncovered_operation_is_refused_warned_of_or_ignored():
    x, w = torch.randn(1, 2, 8), torch.randn(3, 2, 3)
    compiled = torch.compile(F.conv1d)
    with set_batch_invariant_mode(), pytest.raises(UncoveredOperationError, match="convolution"):
        compiled(x, w)
    with set_batch_invariant_mode(on_uncovered="warn"), pytest.warns(UncoveredOperationWarning, match="convolution"):
        assert_same(compiled(x, w), F.conv1d(x, w))
    with set_batch_invariant_mode(on_uncovered="ignore"):
        assert_same(compiled(x, w), F.conv1d(x, w))


def test_flex_attention_is_refused():
    from torch.nn.attention.flex_attention import flex_attention

    q = torch.randn(1, 2, 16, 16)
    with set_batch_invariant_mode(), pytest.raises(Exception, match="flex_attention depends on the batch"):
        torch.compile(flex_attention)(q, q, q)


class Recorder(CustomGraphPass):
    def __init__(self):
        self.targets = []

    def __call__(self, graph):
        self.targets += [str(node.target) for node in graph.nodes]

    def uuid(self):
        return "recorder"


def test_behind_a_break_in_the_graph_the_engines_are_not_compiled():
    """A function that runs in Python, inside a compiled one: Dynamo looks at all that it calls."""

    @skip
    def in_python(x, w):
        return F.softmax(F.linear(x, w), -1)

    counter, x, w = CompileCounter(), torch.randn(3, 16), torch.randn(5, 16, requires_grad=True)
    with set_batch_invariant_mode():
        y = torch.compile(lambda x, w: in_python(x, w), backend=counter)(x, w)
        assert_same(y, F.softmax(F.linear(x, w), -1))
    assert counter.frame_count == 0


def test_a_pass_of_the_user_runs_too():
    recorder = Recorder()
    x, w = torch.randn(3, 16).bfloat16(), torch.randn(5, 16).bfloat16()
    with set_batch_invariant_mode(), torch.no_grad():
        torch.compile(function, options={"post_grad_custom_post_pass": recorder})(x, w)
    assert "bi_torch.gemm.default" in recorder.targets


def test_forms_that_write_are_traced_as_ours():
    x, w, b = torch.randn(3, 16).bfloat16(), torch.randn(16, 16).bfloat16(), torch.randn(3, 16).bfloat16()

    def writes(x, w, b):
        y = F.silu(b.clone().addmm_(x, w, beta=0.5), inplace=True)
        z = torch.empty_like(y)
        torch.mm(y, w, out=z)
        return torch.sum(z.mul_(0.3), 0, out=torch.empty_like(z[0]))

    with set_batch_invariant_mode(), torch.no_grad():
        expected = writes(x, w, b)
        actual, (code,) = run_and_get_code(torch.compile(writes), x, w, b)
    assert_same(actual, expected)
    assert not OWN_KERNELS.findall(code)


@pytest.mark.parametrize("device", coverage.DEVICES)
def test_the_lists_agree_with_the_table(device):
    """What is generated or decomposed is not known to depend on the batch."""
    listed = graph._SELECTIONS | graph._ARITHMETIC | graph._MOVES | graph._DECOMPOSED
    entries = {
        name: e
        for name, e in coverage.entries(device).items()
        if name.partition(".")[0] in listed and e.when is None and "reduce" not in name
    }
    assert len(entries) > 50
    assert not {name for name, e in entries.items() if e.kind == "uncovered" and "not tested" not in e.reason}
