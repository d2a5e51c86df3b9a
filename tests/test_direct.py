"""Calls that need no dispatcher: where it has nothing to do it is not asked, and the results are the same."""

import math
from collections import ChainMap, Counter
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.nvidia import driver

import bi_torch
from bi_torch import direct
from bi_torch.attention import calls
from bi_torch.attention import cuda as attention_cuda
from bi_torch.attention import library as attention_library
from bi_torch.attention.keys import find_keys
from bi_torch.device import direct_launcher
from bi_torch.direct import call_device, kernel_device
from bi_torch.gemm import cuda as gemm_cuda
from bi_torch.gemm import library as gemm_library
from bi_torch.mode import set_batch_invariant_mode
from bi_torch.rows import cuda as rows_cuda
from bi_torch.rows import library as rows_library
from bi_torch.rows import softmax
from bi_torch.rows.library import Op, RowOp
from tests import test_triton_attention, test_triton_fused_attention, test_triton_interpreter, test_triton_rows
from tests.arrays import assert_same, draw
from tests.interpreters.triton import gpu_arithmetic

X = draw(6, 40)


class Subclass(torch.Tensor):
    pass


def test_plain_tensors_need_no_dispatcher():
    assert kernel_device((X, None, 1.0, torch.float32)) == "cpu"
    assert kernel_device((torch.nn.Parameter(X, requires_grad=False), X)) == "cpu"
    with torch.no_grad(), torch.autocast("cpu"):
        assert kernel_device((X.clone().requires_grad_(),)) == "cpu"
    with torch.inference_mode():
        assert kernel_device((X, X.clone())) == "cpu"


@pytest.mark.parametrize(
    "x",
    [
        X.clone().requires_grad_(),
        X.to("meta"),
        X.to_sparse(),
        torch._neg_view(X),
        torch._efficientzerotensor(6, 40),
        X.as_subclass(Subclass),
        FakeTensorMode().from_tensor(X),
        torch._to_functional_tensor(X),
    ],
    ids=["gradient", "meta", "sparse", "negative", "zero", "subclass", "fake", "functional"],
)
def test_other_tensors_need_it(x):
    assert kernel_device((x,)) is None
    assert kernel_device((X, x)) is None


def test_what_a_thread_is_in_needs_it():
    found = []

    def f(x):
        found.append(kernel_device((X,)))
        found.append(kernel_device((x,)))
        return x.sum()

    torch.func.grad(f)(X)
    torch.func.vmap(f)(X)
    torch.jit.trace(f, (X,), check_trace=False)
    for mode in (TorchDispatchMode(), TorchFunctionMode(), FakeTensorMode(allow_non_fake_inputs=True)):
        with mode:
            found.append(kernel_device((X,)))
    with torch.autograd.forward_ad.dual_level():
        found.append(kernel_device((X,)))
    assert len(found) == 10
    assert set(found) == {None}


CALLS = {
    "mm": (torch.mm, lambda x, y: (x, y)),
    "linear": (F.linear, lambda x, y: (x.view(2, 8, 16), y, y[0])),
    "addmm": (lambda *args: torch.addmm(*args, alpha=2, beta=-0.5), lambda x, y: (y[0], x, y)),
    "bmm": (torch.bmm, lambda x, y: (x.view(2, 8, 16), y.view(2, 16, 8))),
    "matmul": (torch.matmul, lambda x, y: (x.view(2, 2, 8, 8), y.view(2, 2, 8, 8).mT)),
    "softmax": (lambda x: x.softmax(-1), lambda x, y: (x.view(2, 8, 16),)),
    "sum": (lambda x: x.sum(-1, keepdim=True), lambda x, y: (x.view(2, 8, 16),)),
    "mean": (lambda x: x.mean((0, 1)), lambda x, y: (x,)),
    "layer_norm": (lambda x, w, b: F.layer_norm(x, (16,), w, b), lambda x, y: (x.view(2, 8, 16), y[0], y[1])),
    "rms_norm": (lambda x, w: F.rms_norm(x, (16,), w), lambda x, y: (x, y[0])),
    "silu": (F.silu, lambda x, y: (x.view(2, 8, 16),)),
}
"""Functions, and their arguments from two [16, 16]."""


@pytest.fixture
def cpu_as_gpu(monkeypatch):
    """Tensors of the CPU pass for those of a GPU, whose kernels run in the interpreter. Counts the calls that are prepared."""
    counts = Counter()

    def launch_rows(launch, device, call):
        counts["launched"] += 1
        with gpu_arithmetic():
            modules = test_triton_rows, test_triton_attention, test_triton_fused_attention
            kernel = ChainMap(*(vars(module.KERNELS) for module in modules))[launch.kernel.__name__]
            kernel[(launch.grid,)](*launch.arguments(call), **launch.options)

    def launch_product(plan, device, *call):
        counts["launched"] += 1
        with gpu_arithmetic():
            kernel = getattr(test_triton_interpreter.KERNELS, plan.kernel.__name__)
            kernel[plan.grid](*plan.arguments(gemm_cuda._TensorMap.described, *call), **plan.options)

    def counted(function, what="prepared"):
        def run(*args):
            counts[what] += 1
            return function(*args)

        return run

    for name in ("_DEVICES", "_CALLS"):
        monkeypatch.setattr(direct, name, dict.fromkeys(getattr(direct, name), "cuda"))
    for module in (gemm_cuda, rows_cuda):
        monkeypatch.setattr(module, "architecture", lambda device, caller: "sm_90")
        monkeypatch.setattr(module, "multiprocessors", lambda device: 3)
    for module in (gemm_cuda, rows_cuda, attention_cuda, calls):
        monkeypatch.setattr(module, "bind_context", lambda: None)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: X.get_device())
    monkeypatch.setattr(rows_cuda.Launch, "__call__", launch_rows)
    monkeypatch.setattr(gemm_cuda.Plan, "_launch", launch_product)
    for library in (gemm_library, rows_library, calls):
        monkeypatch.setattr(library, "kernel_device", counted(kernel_device, "looked at"))
    monkeypatch.setattr(gemm_library, "_first_call", counted(gemm_library._first_call))
    monkeypatch.setattr(RowOp, "__call__", counted(RowOp.__call__))
    monkeypatch.setattr(gemm_library, "CALLS", {})
    monkeypatch.setattr(calls, "CALLS", {})
    return counts


def compare(function, arguments, pairs, request):
    """The results have the CPU's bits, and what was counted meanwhile."""
    with set_batch_invariant_mode(), torch.no_grad():
        expected = [function(*arguments(*pair)) for pair in pairs]
        counts = request.getfixturevalue("cpu_as_gpu")
        for pair, result in zip(pairs, expected, strict=True):
            actual = function(*arguments(*pair))
            assert_same(actual, result)
            assert actual.stride() == result.stride()
    return counts


@pytest.mark.parametrize("name", CALLS)
def test_a_repeated_call_is_a_launch(name, request):
    """The first arguments are one tensor under two names, which must not be taken for a property of the call."""
    x, y = draw(16, 16), draw(16, 16, seed=1)
    counts = compare(*CALLS[name], ((x, x), (x, x), (x, y), (y, x)), request)
    assert (counts["launched"], counts["prepared"]) == (4, 1)
    assert counts["looked at"] <= 3  # the first call looks at the op's arguments, too


def heads(*shape, dtype="bfloat16", seed=0, lost=()):
    """Operands of attention, with what is not finite at some places of the first head."""
    x = draw(*shape, dtype=dtype, seed=seed)
    for i, place in enumerate(lost):
        x[0, 0, place, i] = (math.nan, math.inf, -math.inf)[i % 3]
    return x


def tokens_first(x):
    """As a projection leaves it: neither heads nor batch entries stand behind one another."""
    return x.transpose(1, 2).contiguous().transpose(1, 2)


QUERY, KEY, VALUE = heads(2, 2, 5, 8), heads(2, 1, 21, 8, seed=1), heads(2, 1, 21, 6, seed=2, lost=(2, 20))
STEP = heads(2, 2, 1, 8)
CAUSAL = torch.ones(5, 21, dtype=torch.bool).tril(3)
LEFT = CAUSAL & (torch.arange(21) >= torch.tensor([0, 2])[:, None])[:, None, None]
GAPS = (torch.arange(21) % 4 != torch.tensor([0, 2])[:, None])[:, None, None]

ATTENTIONS = {
    "decoding": (3, (STEP, KEY, VALUE), {"enable_gqa": True}),
    "decoding of repeated keys": (3, (STEP[:1], *(x[:1].repeat_interleave(2, 1) for x in (KEY, VALUE))), {"scale": 0.3}),
    "float32": (3, (STEP.float(), KEY.float(), VALUE.float()), {"enable_gqa": True}),
    "one head": (3, (QUERY[0, 0], KEY[0, 0], VALUE[0, 0]), {}),
    "overflow": (3, (STEP, KEY, torch.full_like(VALUE, 3e38)), {"enable_gqa": True}),
    "causal": (5, (QUERY, KEY, VALUE), {"is_causal": True, "enable_gqa": True}),
    "causal with few keys": (5, (QUERY, KEY[:, :, :3], VALUE[:, :, :3]), {"is_causal": True, "enable_gqa": True}),
    "causal, tokens first": (5, tuple(map(tokens_first, (QUERY, KEY, VALUE))), {"is_causal": True, "enable_gqa": True}),
    "repeated queries": (3, (STEP[:, :1], KEY.repeat_interleave(2, 1), VALUE.repeat_interleave(2, 1)), {}),
    "right padding": (5, (QUERY, KEY, VALUE, CAUSAL), {"enable_gqa": True}),
    "left padding": (6, (QUERY, KEY, VALUE, LEFT), {"enable_gqa": True}),
    "gaps": (6, (STEP, KEY, VALUE, GAPS), {"enable_gqa": True}),
    "nothing admitted": (6, (STEP, KEY, VALUE, GAPS & (torch.arange(2) > 0).view(2, 1, 1, 1)), {"enable_gqa": True}),
}
"""Launches where they are composed, operands and options."""


def other_operands(operands):
    """The same and others, laid out as they are."""
    others = [torch.empty_strided(x.shape, x.stride(), dtype=x.dtype).copy_(x.flip(-1)) for x in operands[:3]]
    return operands, (*others, *operands[3:])


@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_is_one_launch(name, request):
    launches, operands, options = ATTENTIONS[name]
    counts = compare(lambda *x: F.scaled_dot_product_attention(*x, **options), lambda *x: x, other_operands(operands), request)
    assert counts["launched"] == 2 * (launches if name == "float32" else 1)
    assert len(calls.CALLS) <= 1  # none, where the mode has kept the call since another test


COMPOSED = ["decoding of repeated keys", "overflow", "causal, tokens first", "left padding", "repeated queries"]


@pytest.mark.parametrize("name", COMPOSED)
def test_attention_that_is_not_fused_is_a_few_launches(name, request, monkeypatch):
    launches, operands, options = ATTENTIONS[name]
    monkeypatch.setattr(calls, "strides_of", lambda *operands: None)
    counts = compare(
        lambda *x: bi_torch.scaled_dot_product_attention(*x, **options), lambda *x: x, other_operands(operands), request
    )
    assert counts["launched"] == 2 * launches
    assert len(calls.CALLS) == 1


def test_attention_of_one_tensor_under_three_names(request):
    x, y = STEP[:1, :, :, :6].expand(1, 2, 4, 6).contiguous(), QUERY[:1, :, :4, :6].contiguous()
    counts = compare(F.scaled_dot_product_attention, lambda *x: x, ((x, x, x), (x, y, x), (y, x, x), (x, x, y)), request)
    assert counts["launched"] == 4
    assert len(calls.CALLS) <= 1  # none, where the mode has kept the call since another test


def test_attention_looks_at_its_mask_in_every_call(request):
    """One kept call serves masks that admit the first keys, keys in another order, and an order for every row."""
    any_row = torch.rand(2, 1, 5, 21, generator=torch.Generator().manual_seed(0)) < 0.6
    masks = (CAUSAL.expand(2, 1, 5, 21).contiguous(), LEFT, any_row)
    pairs = [(QUERY, KEY, VALUE, mask) for mask in (*masks, LEFT)]
    counts = compare(lambda *x: F.scaled_dot_product_attention(*x, enable_gqa=True), lambda *x: x, pairs, request)
    assert counts["launched"] > 3 + 1
    assert len(calls.CALLS) <= 1  # none, where the mode has kept the call since another test


@pytest.mark.gpu
@pytest.mark.parametrize("name", ATTENTIONS)
def test_attention_has_the_bits_of_a_cpu(name, monkeypatch):
    """The first call, a repeated one, and both in a CUDA graph that is replayed with other operands."""
    _, operands, options = ATTENTIONS[name]
    there = [x.cuda() for x in operands]

    def attend(operands):
        return F.scaled_dot_product_attention(*operands, **options)

    with set_batch_invariant_mode(), torch.no_grad():
        for _ in range(2):
            assert_same(attend(there).cpu(), attend(operands))
        with monkeypatch.context() as patch:  # a graph cannot look at a mask; here kernels are compiled for that
            patch.setattr(attention_library, "mask_keys", lambda mask, admitted: find_keys(admitted, look=None))
            assert_same(attend([x.clone() for x in there]).cpu(), attend(operands))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            results = attend(there), attend(there)
        others = (*(x.flip(-1) for x in operands[:3]), *operands[3:])
        for x, other in zip(there, others, strict=True):
            x.copy_(other)
        graph.replay()
        for result in results:
            assert_same(result.cpu(), attend(others))


@pytest.mark.gpu
def test_attention_looks_again_at_a_mask_that_was_changed():
    """In place, with what the kept call found before, and in another stream."""
    there, mask = [x.cuda() for x in (QUERY, KEY, VALUE)], LEFT.cuda()
    with set_batch_invariant_mode(), torch.no_grad():
        for admitted in (LEFT, LEFT.flip(0), CAUSAL.expand(LEFT.shape), LEFT.roll(3, -1) | ~LEFT):
            mask.copy_(admitted)
            expected = F.scaled_dot_product_attention(QUERY, KEY, VALUE, admitted, enable_gqa=True)
            for _ in range(2):
                assert_same(F.scaled_dot_product_attention(*there, mask, enable_gqa=True).cpu(), expected)
            stream = torch.cuda.Stream()
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                y = F.scaled_dot_product_attention(*there, mask, enable_gqa=True)
            stream.synchronize()
            assert_same(y.cpu(), expected)


@pytest.mark.parametrize("name", ["causal", "left padding", "any"])
def test_attention_in_chunks_and_its_gradients(name, monkeypatch, request):
    """The kernels around the products, as the general path launches them."""
    mask = {"causal": None, "left padding": LEFT, "any": torch.rand(2, 2, 5, 21) < 0.6}[name]
    arguments = (QUERY, KEY, VALUE, mask, mask is None, 0.3, True)
    g = heads(2, 2, 5, 6, seed=3)
    monkeypatch.setattr(attention_library, "CHUNK", 7 * 21)
    monkeypatch.setattr(attention_library, "CAUSAL_BLOCK", 2)
    backward = attention_library._attention_backward
    with torch.no_grad():
        expected = [attention_library.attention(*arguments), *backward(g, *arguments)]
        counts = request.getfixturevalue("cpu_as_gpu")
        with monkeypatch.context() as patch:
            patch.setattr(calls, "strides_of", lambda *operands: None)
            actual = [attention_library.attention(*arguments), *backward(g, *arguments)]
    assert counts["launched"] > 10
    for x, y in zip(actual, expected, strict=True):
        assert_same(x, y)
    monkeypatch.setattr(attention_library, "CHUNK", 1 << 27)
    monkeypatch.setattr(attention_library, "CAUSAL_BLOCK", 512)
    with torch.no_grad():
        assert_same(attention_library.attention(*arguments), expected[0])
    assert len(calls.CALLS) == 1


@pytest.mark.gpu
@pytest.mark.parametrize("name", CALLS)
def test_repeated_calls_have_the_bits_of_a_cpu(name):
    function, arguments = CALLS[name]
    x, y = draw(16, 16), draw(16, 16, seed=1)
    with set_batch_invariant_mode(), torch.no_grad():
        for pair in ((x, x), (x, x), (x, y), (y, x)):
            there = function(*arguments(*(z.cuda() for z in pair)))
            assert_same(there.cpu(), function(*arguments(*pair)))


def test_what_is_copied_is_prepared_again(request):
    x, y = draw(16, 16), draw(16, 16, seed=1)
    pairs = ((x, y), (y, x), (x.t(), y), (x[::2], y), (x[:, :9], y), (x[:, :9], y))
    counts = compare(lambda x, y: x.softmax(0), lambda x, y: (x, y), pairs, request)
    assert (counts["launched"], counts["prepared"]) == (6, 6)


def test_another_layout_is_another_call(request):
    """In all of what the kernels are made for: shapes, strides, alignment, dtypes, options."""
    x, y = draw(16, 24), draw(24, 16)
    offset = torch.cat([x.flatten(), x.flatten()])[1 : 1 + x.numel()].view(x.shape)
    pairs = ((x, y), (x[:8], y), (x, y[:, :8]), (y.t(), x.t()), (offset, y), (x.float(), y.float()))
    counts = compare(torch.mm, lambda x, y: (x, y), pairs * 3, request)
    assert (counts["launched"], counts["prepared"]) == (18, 6)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("recording", [False, True])
def test_a_plain_call_goes_through_the_dispatcher_once(name, recording, monkeypatch):
    """To the mode's kernel, where no tensor needs a gradient; none of our ops is called through it."""
    monkeypatch.setattr(gemm_library, "_op", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(Op, "_below_autograd", mock.Mock(side_effect=AssertionError))
    function, arguments = CALLS[name]
    with set_batch_invariant_mode(), torch.set_grad_enabled(recording):
        function(*arguments(draw(16, 16), draw(16, 16)))


def test_a_call_that_records_goes_through_our_op(monkeypatch):
    """A gradient may be recorded of any argument, one in a list or passed by keyword too."""
    x, y = draw(16, 16), draw(16, 16)
    wanted = x.clone().requires_grad_()
    keyset = torch._C._dispatch_keys(x)
    for args, kwargs in (((wanted, y), {}), ((y, wanted), {}), (([wanted],), {}), ((x,), {"out": wanted})):
        assert call_device(keyset, args, kwargs) is None
    with set_batch_invariant_mode():
        assert torch.mm(y, wanted).requires_grad
        assert F.rms_norm(y, (16,), wanted[0]).requires_grad


class Unread(dict):
    """What must not be looked into."""

    def get(self, key, default=None):
        raise AssertionError


def test_a_compiler_does_not_look_at_what_is_kept(monkeypatch):
    """It would compile anew whenever something is."""
    monkeypatch.setattr(gemm_library, "CALLS", Unread())
    monkeypatch.setattr(softmax._softmax, "_calls", Unread())
    monkeypatch.setattr(calls, "CALLS", Unread())
    attend = bi_torch.scaled_dot_product_attention
    function = torch.compile(lambda x: attend(bi_torch.softmax(bi_torch.mm(x, x), -1), x, x), backend="eager", fullgraph=True)
    with torch.no_grad():
        assert_same(function(X[:, :6]), attend(bi_torch.softmax(bi_torch.mm(X[:, :6], X[:, :6]), -1), X[:, :6], X[:, :6]))


def test_autocast_is_another_call():
    def function(x):
        return NotImplemented if torch.is_autocast_enabled("cuda") else direct.repeat(lambda given: given[0] + 1, (x,))

    repeated = direct.Repeated(function)
    for enabled in (False, True, False):
        torch.set_autocast_enabled("cuda", enabled)
        try:
            assert (repeated((X,)) is NotImplemented) == enabled
        finally:
            torch.set_autocast_enabled("cuda", False)


@pytest.mark.parametrize("maps", [0, 2])
def test_a_direct_launch_passes_what_triton_passes(maps):
    """All but the tensor maps, which are encoded beforehand."""
    calls = []
    launcher = object.__new__(driver.CudaLauncher)
    launcher.global_scratch_size = launcher.profile_scratch_size = 0
    launcher.global_scratch_align = launcher.profile_scratch_align = 1
    launcher.launch_cooperative_grid, launcher.launch_pdl = False, True
    signature = dict.fromkeys(range(maps), "tensordesc<>") | {maps: "i32"}
    launcher.launch = driver.wrap_handle_tensordesc(
        mock.Mock(side_effect=lambda *args: calls.append(args)), signature, ["layout"] * maps
    )
    metadata = SimpleNamespace(global_scratch_size=0, profile_scratch_size=0)
    compiled = SimpleNamespace(run=launcher, function="function", packed_metadata="metadata", metadata=metadata)
    direct_launcher(compiled, (7, 2, 1))("stream", ("encoded",) * maps + (5,))
    with mock.patch.object(driver, "make_tensordesc_arg", return_value=["encoded"]):
        launcher(7, 2, 1, "stream", "function", "metadata", None, None, None, *("descriptor",) * maps, 5)
    assert calls[0] == calls[1]
    metadata.global_scratch_size = 1
    with pytest.raises(NotImplementedError, match="scratch"):
        direct_launcher(compiled, (7, 2, 1))
