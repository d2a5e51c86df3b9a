"""The public functions of `bi_torch` on a CPU: values, bits, shapes, views, arguments, errors, gradients, compilation."""

import functools
import inspect

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.library import opcheck

import bi_torch
from bi_torch import mode
from shared_specs.formats import FORMATS
from tests.arrays import DTYPES, assert_same, draw, model, views
from tests.calls import CALLS
from tests.row_calls import ROW_CALLS

dtypes = pytest.mark.parametrize("dtype", FORMATS)

# What torch calls the same op.
STOCK = {name: getattr(torch, name, None) or getattr(torch.nn.functional, name) for name in CALLS}
ops = pytest.mark.parametrize("op", CALLS)


def arguments(op, dtype="bfloat16", **options):
    return [draw(*shape, dtype=dtype, seed=i, **options) for i, shape in enumerate(CALLS[op])]


def test_every_public_function_is_tested():
    elsewhere = {"scaled_dot_product_attention", *mode.__all__}
    assert set(CALLS) | {call.name for call in ROW_CALLS} == set(bi_torch.__all__) - elsewhere


@ops
def test_arguments_are_named_as_in_torch(op):
    stock = {"linear": "input weight bias", "addmm": "bias a b", "baddbmm": "bias a b"}.get(op, "a b").split()
    parameters = inspect.signature(getattr(bi_torch, op)).parameters
    positional = [name for name, p in parameters.items() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == stock
    assert "out_dtype" in parameters


@ops
@dtypes
def test_values_are_those_of_torch(op, dtype):
    args = arguments(op, dtype)
    exact = STOCK[op](*(x.double() for x in args))
    size = STOCK[op](*(x.double().abs() for x in args))
    chain = 2.0**-21 if dtype == "float32" else 2.0**-19
    for out_dtype in (DTYPES[dtype], torch.float32):
        out = getattr(bi_torch, op)(*args, out_dtype=out_dtype)
        assert out.shape == exact.shape
        assert out.dtype == out_dtype
        bound = torch.finfo(out_dtype).eps * exact.abs() + chain * size
        assert ((out.double() - exact).abs() <= bound).all()


@ops
def test_out_dtype_defaults_to_the_operands(op):
    assert getattr(bi_torch, op)(*arguments(op, "float16")).dtype == torch.float16


MATMULS = [
    ((7,), (7,)),
    ((7,), (7, 5)),
    ((4, 7), (7,)),
    ((4, 7), (7, 5)),
    ((3, 4, 7), (7,)),
    ((7,), (3, 7, 5)),
    ((3, 4, 7), (7, 5)),
    ((4, 7), (3, 7, 5)),
    ((3, 4, 7), (3, 7, 5)),
    ((3, 4, 7), (1, 7, 5)),
    ((1, 4, 7), (3, 7, 5)),
    ((2, 3, 4, 7), (7, 5)),
    ((2, 3, 4, 7), (7,)),
    ((2, 1, 4, 7), (3, 7, 5)),
    ((2, 3, 4, 7), (2, 3, 7, 5)),
    ((3, 4, 7), (2, 1, 7, 5)),
    ((2, 1, 2, 4, 7), (3, 1, 7, 5)),
    ((7,), (2, 3, 7, 5)),
    ((0, 4, 7), (7, 5)),
    ((2, 0, 4, 7), (1, 7, 5)),
    ((0,), (0,)),
    ((0,), (0, 5)),
    ((3, 4, 0), (0,)),
    ((0, 7), (7,)),
    ((1, 1), (1, 1)),
]


@pytest.mark.parametrize(("left", "right"), MATMULS)
def test_matmul_broadcasts_as_torch_does(left, right):
    a, b = draw(*left), draw(*right, seed=1)
    stock = torch.matmul(a, b)
    wide_a, wide_b = (a[None] if a.dim() == 1 else a), (b[:, None] if b.dim() == 1 else b)
    expected = model(wide_a, wide_b).reshape(stock.shape)
    assert_same(bi_torch.matmul(a, b), expected)
    out = torch.empty_like(stock)
    assert bi_torch.matmul(a, b, out=out) is out
    assert_same(out, expected)


@pytest.mark.parametrize("shape", [(7,), (4, 7), (2, 3, 7), (2, 1, 3, 7), (0, 7), (2, 0, 7)])
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear_takes_any_number_of_dimensions(shape, with_bias):
    x, weight, bias = draw(*shape), draw(5, 7, seed=1), draw(5, seed=2) if with_bias else None
    expected = model(x[None] if x.dim() == 1 else x, weight.t(), bias).reshape(*shape[:-1], 5)
    assert_same(bi_torch.linear(x, weight, bias), expected)


@pytest.mark.parametrize(("m", "k", "n"), [(0, 3, 4), (2, 0, 4), (2, 3, 0), (0, 0, 0), (0, 3, 0), (1, 1, 1)])
@dtypes
def test_empty_extents(dtype, m, k, n):
    a, b, bias = draw(m, k, dtype=dtype), draw(k, n, dtype=dtype, seed=1), draw(m, n, dtype=dtype, seed=2)
    assert_same(bi_torch.mm(a, b), model(a, b))
    assert_same(bi_torch.addmm(bias, a, b, beta=0.5), model(a, b, bias, beta=0.5))
    assert_same(bi_torch.linear(a, b.t(), bias[:1].reshape(-1) if m else draw(n, dtype=dtype)).new_empty(0), a.new_empty(0))
    for batch in (0, 2):
        x, y = a.expand(batch, m, k), b.expand(batch, k, n)
        assert_same(bi_torch.bmm(x, y), model(x, y))
        assert_same(bi_torch.baddbmm(bias, x, y), model(x, y, bias))
        assert_same(bi_torch.matmul(x, b), model(x, b))


VIEWS = [name for name, _ in views(draw(2, 2))]


@dtypes
@pytest.mark.parametrize("view", VIEWS)
def test_views_of_operands(dtype, view):
    a = dict(views(draw(9, 37, dtype=dtype, kind="wide")))[view]
    b = dict(views(draw(37, 6, dtype=dtype, kind="wide", seed=1)))[view]
    bias = dict(views(draw(9, 6, dtype=dtype, seed=2)))[view]
    assert_same(bi_torch.mm(a, b), model(a, b))
    assert_same(bi_torch.addmm(bias, a, b), model(a, b, bias))
    assert_same(bi_torch.linear(a, b.t()), model(a, b))


def test_views_of_batches():
    a, b = draw(2, 3, 5, 20, kind="wide"), draw(2, 3, 20, 4, kind="wide", seed=1)
    for x, y in [
        (a.transpose(0, 1), b.transpose(0, 1)),
        (a[:, ::2], b[:, ::2]),
        (a[:, :1].expand(2, 3, 5, 20), b),
        (a.movedim(1, 2).contiguous().movedim(2, 1), b[:1]),
        (a.movedim(1, 2).contiguous().movedim(2, 1), b[0, 0]),
        (a[:, :, ::2, 3:], b.flip(-1)[0, 0, 3:]),
    ]:
        assert_same(bi_torch.matmul(x, y), model(x, y))
    assert_same(bi_torch.bmm(a[0].transpose(0, 1).contiguous().transpose(0, 1), b[0]), model(a[0], b[0]))


def test_conjugate_and_negative_views():
    z = torch.complex(draw(4, 9, dtype="float32"), draw(4, 9, dtype="float32", seed=1))
    a, b = z.conj().imag, draw(9, 5, dtype="float32")
    assert a.is_neg()
    assert_same(bi_torch.mm(a, b), model(a.resolve_neg(), b))


@dtypes
@pytest.mark.parametrize("bias_dtype", ["operand", "float32"])
@pytest.mark.parametrize("shape", [(), (1,), (5,), (1, 5), (6, 1), (6, 5)])
def test_bias_broadcasts(dtype, bias_dtype, shape):
    bias = draw(*shape, dtype=dtype if bias_dtype == "operand" else "float32", seed=3)
    a, b = draw(6, 20, dtype=dtype), draw(20, 5, dtype=dtype, seed=1)
    for out_dtype in (DTYPES[dtype], torch.float32):
        actual = bi_torch.addmm(bias, a, b, alpha=0.1, beta=-1.7, out_dtype=out_dtype)
        assert_same(actual, model(a, b, bias, alpha=0.1, beta=-1.7, out_dtype=out_dtype))
    x, y = a.expand(2, 6, 20), b.expand(2, 20, 5)
    assert_same(bi_torch.baddbmm(bias, x, y, alpha=0.1), model(x, y, bias, alpha=0.1))


def test_beta_zero_does_not_read_the_bias():
    a, b = draw(6, 20), draw(20, 5, seed=1)
    for beta in (0, 0.0, -0.0):
        bias = torch.full((6, 5), float("nan"), dtype=a.dtype)
        assert_same(bi_torch.addmm(bias, a, b, beta=beta, alpha=3), model(a, b, alpha=3))
        assert_same(bi_torch.baddbmm(bias, a[None], b[None], beta=beta), model(a[None], b[None]))
    assert bi_torch.addmm(bias, a, b, beta=1).isnan().all()


def test_scalars_are_rounded_to_float32_once():
    a, b, bias = (draw(*s, dtype="float32", seed=i) for i, s in enumerate([(6, 20), (20, 5), (5,)]))
    rounded = {"alpha": float(np.float32(0.1)), "beta": float(np.float32(1e-3))}
    assert_same(bi_torch.addmm(bias, a, b, alpha=0.1, beta=1e-3), bi_torch.addmm(bias, a, b, **rounded))
    assert_same(bi_torch.addmm(bias, a, b, alpha=2, beta=True), bi_torch.addmm(bias, a, b, alpha=2.0, beta=1.0))


@ops
@dtypes
def test_out(op, dtype):
    if op == "linear":
        assert "out" not in inspect.signature(bi_torch.linear).parameters, "torch's linear has none"
        return
    args = arguments(op, dtype)
    for out_dtype in (DTYPES[dtype], torch.float32):
        expected = getattr(bi_torch, op)(*args, out_dtype=out_dtype)
        strided = torch.zeros(*expected.shape[:-1], 2 * expected.shape[-1] + 1, dtype=out_dtype)
        reordered = torch.empty(expected.shape[::-1], dtype=out_dtype).permute(*reversed(range(expected.dim())))
        for out in (torch.empty_like(expected), strided[..., 1::2], reordered):
            assert getattr(bi_torch, op)(*args, out=out) is out
            assert_same(out, expected)
        assert not strided[..., ::2].any(), "written beside out"


def test_out_may_be_the_bias():
    a, b, bias = draw(6, 20), draw(20, 5, seed=1), draw(6, 5, seed=2)
    expected = bi_torch.addmm(bias, a, b, beta=0.5)
    bi_torch.addmm(bias, a, b, beta=0.5, out=bias)
    assert_same(bias, expected)


def test_out_that_cannot_be_written():
    a, b = draw(6, 6), draw(6, 6, seed=1)
    cases = {
        r"out must be \[6, 6\] torch.bfloat16 on cpu, got \[6, 5\]": torch.empty(6, 5, dtype=a.dtype),
        "out_dtype must be torch.bfloat16 or torch.float32, got torch.float16": torch.empty(6, 6, dtype=torch.float16),
        "on cpu, got .* on meta": torch.empty(6, 6, dtype=a.dtype, device="meta"),
        "share one memory location": torch.empty(6, 1, dtype=a.dtype).expand(6, 6),
        "out overlaps a in memory": a,
        "out overlaps b in memory": b.t(),
    }
    for message, out in cases.items():
        before = a.clone(), b.clone()
        with pytest.raises(RuntimeError, match=rf"bi_torch\.mm: .*{message}"):
            bi_torch.mm(a, b, out=out)
        assert_same(a, before[0])
        assert_same(b, before[1])
    base = torch.zeros(12, 6, dtype=a.dtype)
    with pytest.raises(RuntimeError, match="out overlaps bias"):
        bi_torch.addmm(base[1:7], a, b, out=base[:6])
    with pytest.raises(RuntimeError, match="out overlaps a"):
        bi_torch.mm(base[:6], b, out=base[5:11])
    with pytest.raises(RuntimeError, match=r"out must be \[6, 6\] torch.float32"):
        bi_torch.mm(a, b, out=torch.empty(6, 6, dtype=a.dtype), out_dtype=torch.float32)
    with pytest.raises(TypeError, match=r"bi_torch\.matmul: out must be a torch.Tensor, got list"):
        bi_torch.matmul(a[0], b, out=[])


bf16 = functools.partial(torch.zeros, dtype=torch.bfloat16)
ERRORS = [
    ("mm", (bf16(2, 3), bf16(4, 5)), RuntimeError, r"reduced extents differ: \[2, 3\] and \[4, 5\]"),
    ("mm", (bf16(2, 3), bf16(3)), RuntimeError, r"a and b must have 2 dimensions, got \[2, 3\] and \[3\]"),
    ("mm", (bf16(1, 2, 3), bf16(1, 3, 2)), RuntimeError, "must have 2 dimensions"),
    ("addmm", (bf16(4), bf16(2, 3), bf16(3, 5)), RuntimeError, r"bias \[4\] does not broadcast to \[2, 5\]"),
    ("addmm", (bf16(1, 2, 5), bf16(2, 3), bf16(3, 5)), RuntimeError, "bias .* does not broadcast"),
    ("bmm", (bf16(2, 2, 3), bf16(1, 3, 4)), RuntimeError, "batch sizes differ"),
    ("bmm", (bf16(2, 3), bf16(3, 4)), RuntimeError, "must have 3 dimensions"),
    ("baddbmm", (bf16(3, 1, 1), bf16(2, 2, 3), bf16(2, 3, 4)), RuntimeError, "bias .* does not broadcast"),
    ("matmul", (bf16(()), bf16(3)), RuntimeError, "at least one dimension"),
    ("matmul", (bf16(2, 4, 3), bf16(3, 3, 5)), RuntimeError, "batch dimensions do not broadcast"),
    ("matmul", (bf16(3), bf16(4)), RuntimeError, "reduced extents differ"),
    ("linear", (bf16(2, 3), bf16(3, 4)), RuntimeError, "reduced extents differ"),
    ("linear", (bf16(2, 3), bf16(3)), RuntimeError, r"input must be \[\*, K\] and weight \[N, K\]"),
    ("linear", (bf16(2, 3), bf16(4, 3), bf16(3)), RuntimeError, r"bias must be \[N\] = \[4\], got \[3\]"),
    ("linear", (bf16(2, 3), bf16(4, 3), bf16(1)), RuntimeError, r"bias must be \[N\]"),
    ("linear", (bf16(2, 3), bf16(4, 3), [0.0]), TypeError, "bias must be a torch.Tensor, got list"),
    ("linear", ([0.0], bf16(4, 3)), TypeError, "input must be a torch.Tensor, got list"),
    ("mm", (np.zeros((2, 3)), bf16(3, 4)), TypeError, "a must be a torch.Tensor, got ndarray"),
    ("mm", (bf16(2, 3), None), TypeError, "b must be a torch.Tensor, got NoneType"),
    ("addmm", (1.0, bf16(2, 3), bf16(3, 5)), TypeError, "bias must be a torch.Tensor, got float"),
    (
        "mm",
        (bf16(2, 3), torch.zeros(3, 4)),
        RuntimeError,
        "one dtype of bfloat16, float16, float32, got .* torch.float32",
    ),
    ("mm", (bf16(2, 3).double(), bf16(3, 4).double()), RuntimeError, "bfloat16, float16, float32, got torch.float64"),
    ("mm", (bf16(2, 3).char(), bf16(3, 4).char()), RuntimeError, "got torch.int8"),
    ("mm", (bf16(2, 3).to(torch.complex64), bf16(3, 4).to(torch.complex64)), RuntimeError, "got torch.complex64"),
    ("addmm", (bf16(4).half(), bf16(2, 3), bf16(3, 4)), RuntimeError, "bias must be torch.bfloat16 or torch.float32"),
    ("mm", (bf16(2, 3).to("meta"), bf16(3, 4)), RuntimeError, "one CPU or CUDA device, got meta and cpu"),
    ("addmm", (bf16(4).to("meta"), bf16(2, 3), bf16(3, 4)), RuntimeError, "bias must be .* on cpu, got .* on meta"),
    ("mm", (bf16(2, 3).to_sparse(), bf16(3, 4)), RuntimeError, "a must be a dense tensor, got layout torch.sparse_coo"),
    ("mm", (bf16(2, 3), bf16(3, 4).to_sparse()), RuntimeError, "b must be a dense tensor"),
    ("addmm", (bf16(4).to_sparse(), bf16(2, 3), bf16(3, 4)), RuntimeError, "bias must be a dense tensor"),
]


@pytest.mark.parametrize(("op", "args", "error", "message"), ERRORS)
def test_errors_name_the_op_the_argument_and_what_is_allowed(op, args, error, message):
    with pytest.raises(error, match=rf"bi_torch\.{op}: .*{message}"):
        getattr(bi_torch, op)(*args)


@ops
def test_out_dtypes_that_are_not_offered(op):
    for out_dtype in (torch.float16, torch.float64, torch.int32, "float32"):
        with pytest.raises(RuntimeError, match=rf"bi_torch\.{op}: out_dtype must be torch.bfloat16 or torch.float32"):
            getattr(bi_torch, op)(*arguments(op), out_dtype=out_dtype)


@pytest.mark.parametrize("scalar", ["two", 1j, None])
def test_scalars_must_be_real(scalar):
    with pytest.raises((TypeError, RuntimeError), match="'alpha'"):
        bi_torch.addmm(bf16(4), bf16(2, 3), bf16(3, 4), alpha=scalar)


def test_gradients_through_out_are_refused():
    a, b = draw(6, 6, dtype="float32"), draw(6, 6, dtype="float32", seed=1)
    for args, out in [((a.clone().requires_grad_(), b), torch.empty(6, 6)), ((a, b), torch.empty(6, 6).requires_grad_())]:
        with pytest.raises(RuntimeError, match=r"bi_torch\.gemm: .*out=.* automatic differentiation"):
            bi_torch.mm(*args, out=out)
        with torch.no_grad():
            assert_same(bi_torch.mm(*args, out=out), model(a, b))


def test_forward_mode_is_refused():
    a, b = draw(6, 6, dtype="float32"), draw(6, 6, dtype="float32", seed=1)
    with torch.autograd.forward_ad.dual_level():
        assert_same(bi_torch.mm(a, b), model(a, b))
        with pytest.raises(NotImplementedError, match="jvp"):
            bi_torch.mm(torch.autograd.forward_ad.make_dual(a, a), b)
    with pytest.raises(NotImplementedError, match="jvp"):
        torch.func.jvp(lambda x: bi_torch.mm(x, b), (a,), (a,))


@ops
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_gradients(op, dtype):
    """Against torch's own in float64; the bound is a few roundings of the products and of the operand dtype."""
    args = [x.requires_grad_() for x in arguments(op, dtype)]
    exact_args = [x.detach().double().requires_grad_() for x in args]
    out, exact = getattr(bi_torch, op)(*args), STOCK[op](*exact_args)
    cotangent = draw(*out.shape, dtype=dtype, seed=9)
    actual = torch.autograd.grad(out, args, cotangent)
    expected = torch.autograd.grad(exact, exact_args, cotangent.double())
    size = torch.autograd.grad(
        STOCK[op](*(absolute := [x.detach().double().abs().requires_grad_() for x in args])), absolute, cotangent.double().abs()
    )
    chain = 2.0**-21 if dtype == "float32" else 2.0**-18
    for x, got, want, terms in zip(args, actual, expected, size, strict=True):
        assert got.shape == x.shape
        assert got.dtype == x.dtype
        assert ((got.double() - want).abs() <= torch.finfo(x.dtype).eps * want.abs() + chain * terms).all()


def test_gradients_are_products_under_the_contract():
    a, b, bias = (x.requires_grad_() for x in (draw(6, 20), draw(20, 5, seed=1), draw(5, seed=2)))
    out = bi_torch.addmm(bias, a, b, alpha=0.3, beta=1.7)
    g = draw(6, 5, seed=3)
    grad_bias, grad_a, grad_b = torch.autograd.grad(out, (bias, a, b), g)
    assert_same(grad_a, model(g, b.detach().t(), alpha=0.3))
    assert_same(grad_b, model(a.detach().t(), g, alpha=0.3))
    assert_same(grad_bias, model(torch.ones(1, 6, dtype=g.dtype), g, alpha=1.7)[0])


def test_gradient_of_float32_outputs_is_rounded_to_the_operands_dtype():
    a, b = draw(6, 20).requires_grad_(), draw(20, 5, seed=1)
    g = draw(6, 5, dtype="float32", seed=3)
    (grad,) = torch.autograd.grad(bi_torch.mm(a, b, out_dtype=torch.float32), a, g)
    assert_same(grad, model(g.to(a.dtype), b.t()))


@pytest.mark.parametrize("needed", [(True, False, False), (False, True, False), (False, False, True), (True, True, True)])
def test_only_needed_gradients_are_computed(needed, monkeypatch):
    args = [x.requires_grad_(need) for x, need in zip(arguments("addmm"), needed, strict=True)]
    out = bi_torch.addmm(*args)
    products = []
    library = inspect.getmodule(bi_torch.mm.__globals__["gemm"])
    original = library.gemm
    monkeypatch.setattr(library, "gemm", lambda *a: products.append(1) or original(*a))
    out.sum().backward()
    assert len(products) == sum(needed)
    assert [x.grad is not None for x in args] == list(needed)


@pytest.mark.parametrize("shapes", [((4, 7), (7, 5)), ((2, 3, 4, 7), (7, 5)), ((2, 1, 4, 7), (3, 7, 5)), ((7,), (3, 7, 5))])
def test_second_order_gradients(shapes):
    a, b = (draw(*s, dtype="float32", seed=i).requires_grad_() for i, s in enumerate(shapes))

    def second(matmul, a, b):
        grads = torch.autograd.grad(matmul(a, b).square().sum(), (a, b), create_graph=True)
        return torch.autograd.grad(sum(g.pow(3).sum() for g in grads), (a, b))

    exact = second(torch.matmul, *(x.detach().double().requires_grad_() for x in (a, b)))
    for got, want in zip(second(bi_torch.matmul, a, b), exact, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))


def test_parameters_and_modes():
    layer = torch.nn.Linear(20, 5, dtype=torch.bfloat16)
    x = draw(6, 20)
    out = bi_torch.linear(x, layer.weight, layer.bias)
    out.sum().backward()
    assert layer.weight.grad.shape == (5, 20)
    assert_same(out.detach(), model(x, layer.weight.t(), layer.bias))
    with torch.no_grad():
        assert not bi_torch.linear(x, layer.weight).requires_grad
    with torch.inference_mode():
        inferred = bi_torch.linear(x, layer.weight, layer.bias)
        assert inferred.is_inference()
        assert_same(inferred, out)


@ops
def test_meta_tensors(op):
    args = arguments(op)
    expected = getattr(bi_torch, op)(*args, out_dtype=torch.float32)
    out = getattr(bi_torch, op)(*(x.to("meta") for x in args), out_dtype=torch.float32)
    assert out.is_meta
    assert (out.shape, out.dtype, out.stride()) == (expected.shape, expected.dtype, expected.stride())


@pytest.mark.parametrize(
    "args",
    [
        (draw(4, 7), draw(7, 5), None, 1.0, 1.0, torch.bfloat16),
        (draw(3, 4, 7).requires_grad_(), draw(7, 5).requires_grad_(), draw(5).requires_grad_(), 0.5, 2.0, torch.float32),
        (draw(4, 7).t(), draw(4, 5), draw(7, 1, dtype="float32"), 1.0, 0.0, torch.bfloat16),
    ],
)
def test_registration(args):
    """Schema, fake kernel, autograd registration and AOT dispatch, as PyTorch itself checks them."""
    opcheck(torch.ops.bi_torch.gemm.default, args)
    out = torch.empty(torch.matmul(args[0], args[1]).shape, dtype=args[-1])
    opcheck(torch.ops.bi_torch.gemm.out, tuple(x.detach() if torch.is_tensor(x) else x for x in args), {"out": out})


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiled_programs_keep_the_op(dynamic):
    graphs = []

    def backend(module, inputs):
        graphs.append(module)
        return module

    def program(x, weight, bias):
        return bi_torch.linear(x.relu(), weight, bias, out_dtype=torch.float32) + bi_torch.mm(x, weight.t())

    args = draw(6, 20), draw(5, 20, seed=1), draw(5, seed=2)
    torch._dynamo.reset()
    compiled = torch.compile(program, fullgraph=True, dynamic=dynamic, backend=backend)
    assert_same(compiled(*args), program(*args))
    targets = [str(node.target) for graph in graphs for node in graph.graph.nodes]
    assert targets.count("bi_torch.gemm.default") == 2
    assert not any(name in target for target in targets for name in ("aten.mm", "matmul", "addmm", "linear"))


def test_compiled_gradients():
    args = [x.requires_grad_() for x in (draw(6, 20), draw(5, 20, seed=1), draw(5, seed=2))]
    torch._dynamo.reset()
    compiled = torch.compile(bi_torch.linear, fullgraph=True, backend="aot_eager")
    for got, want in zip(
        torch.autograd.grad(compiled(*args).sum(), args), torch.autograd.grad(bi_torch.linear(*args).sum(), args), strict=True
    ):
        assert_same(got, want)


def test_compiled_programs_may_write_to_out():
    a, b, out = draw(6, 20), draw(20, 5, seed=1), torch.empty(6, 5, dtype=torch.bfloat16)
    torch._dynamo.reset()
    torch.compile(lambda out: bi_torch.mm(a, b, out=out), backend="aot_eager")(out)
    assert_same(out, model(a, b))


def test_transforms_of_torch_func():
    a, b = draw(3, 4, 7), draw(3, 7, 5, seed=1)
    assert_same(torch.func.vmap(bi_torch.mm)(a, b), bi_torch.bmm(a, b))
    assert_same(torch.func.vmap(bi_torch.mm, in_dims=(0, None))(a, b[0]), bi_torch.matmul(a, b[0]))
    x = a[0].clone().requires_grad_()
    bi_torch.mm(x, b[0]).sum().backward()
    assert_same(torch.func.grad(lambda x: bi_torch.mm(x, b[0]).sum())(a[0]), x.grad)


@dtypes
def test_a_row_does_not_depend_on_the_batch(dtype):
    x, weight, bias = (draw(*s, dtype=dtype, seed=i) for i, s in enumerate([(65, 100), (24, 100), (24,)]))
    whole = bi_torch.linear(x, weight, bias)
    for size in (1, 2, 3, 5, 8, 16, 17, 33, 64):
        for start in (0, 65 - size):
            assert_same(bi_torch.linear(x[start : start + size], weight, bias), whole[start : start + size])
    order = torch.randperm(65, generator=torch.Generator().manual_seed(0))
    assert_same(bi_torch.linear(x[order], weight, bias), whole[order])
    assert_same(bi_torch.matmul(x[:, None], weight.t())[:, 0], bi_torch.mm(x, weight.t()))
    assert_same(bi_torch.bmm(x[:3, None], weight.t().expand(3, -1, -1))[:, 0], bi_torch.mm(x[:3], weight.t()))
    assert_same(bi_torch.matmul(x[5], weight.t()), bi_torch.mm(x, weight.t())[5])


@dtypes
@settings(max_examples=25, deadline=None)
@given(
    m=st.integers(1, 20), k=st.integers(0, 140), n=st.integers(1, 20), row=st.integers(0, 19), column=st.integers(0, 19),
    pad=st.integers(0, 80),
)  # fmt: skip
def test_an_output_depends_on_its_row_and_column_alone(dtype, m, k, n, row, column, pad):
    a, b = draw(m, k, dtype=dtype, kind="wide"), draw(k, n, dtype=dtype, kind="wide", seed=1)
    i, j = row % m, column % n
    zeros = torch.zeros(max(m, n), pad, dtype=a.dtype)
    alone = bi_torch.mm(torch.cat([a[i : i + 1], zeros[:1]], 1), torch.cat([b[:, j : j + 1], zeros.t()[:, :1]]))
    assert_same(bi_torch.mm(a, b)[i : i + 1, j : j + 1], alone)


@dtypes
def test_rows_of_zeros_at_the_end_of_the_batch_leave_weight_gradients_alone(dtype):
    x, g = draw(37, 20, dtype=dtype), draw(37, 6, dtype=dtype, seed=1)
    weight, bias = draw(6, 20, dtype=dtype, seed=2).requires_grad_(), draw(6, dtype=dtype, seed=3).requires_grad_()

    def gradients(x, g):
        return torch.autograd.grad(bi_torch.linear(x, weight, bias), (weight, bias), g)

    expected = gradients(x, g)
    for rows in (1, 10, 11, 27, 91):
        padded = gradients(*(torch.cat([y, torch.zeros(rows, y.shape[1], dtype=y.dtype)]) for y in (x, g)))
        for got, want in zip(padded, expected, strict=True):
            assert_same(got, want)


def test_a_folded_batch_has_the_weight_gradient_of_its_rows():
    x, g, weight = draw(3, 5, 20), draw(3, 5, 6, seed=1), draw(6, 20, seed=2).requires_grad_()
    (folded,) = torch.autograd.grad(bi_torch.linear(x, weight), weight, g)
    (flat,) = torch.autograd.grad(bi_torch.linear(x.reshape(15, 20), weight), weight, g.reshape(15, 6))
    assert_same(folded, flat)
