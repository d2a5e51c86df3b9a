"""The mode as a switch: what it does to a model, how regions nest, what other threads and processes see, what it refuses."""

import os
import subprocess
import sys
import threading
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import bi_torch
from bi_torch import mode
from bi_torch.mode import (
    Mode,
    UncoveredOperationError,
    UncoveredOperationWarning,
    current_mode,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
    uncovered_calls,
)
from bi_torch.mode.activations import WITHOUT_POW
from bi_torch.rows import elementary
from tests.arrays import assert_same, draw

ON, OFF = Mode(), None


@pytest.fixture(autouse=True)
def _off_before_and_after():
    assert current_mode() is None
    yield
    disable_batch_invariant_mode()


def replaced() -> bool:
    """Whether the dispatcher runs our kernels."""
    return "bi_torch" in torch._C._dispatch_dump("aten::mm")


# ------------------------------------------------------------------------------------------------------------- regions


def test_a_region():
    with set_batch_invariant_mode():
        assert is_batch_invariant_mode_enabled()
        assert replaced()
        assert current_mode() == ON
    assert not is_batch_invariant_mode_enabled()
    assert not replaced()


def test_regions_nest():
    with set_batch_invariant_mode():
        with set_batch_invariant_mode(False):
            assert not replaced()
            with set_batch_invariant_mode(portable=True, on_uncovered="ignore"):
                assert current_mode() == Mode(portable=True, on_uncovered="ignore")
            assert current_mode() is OFF
        assert current_mode() == ON
        with set_batch_invariant_mode():
            assert current_mode() == ON
        assert replaced()


def test_an_exception_leaves_the_state_before():
    with set_batch_invariant_mode(), pytest.raises(KeyError), set_batch_invariant_mode(False):
        raise KeyError
    with pytest.raises(KeyError), set_batch_invariant_mode():
        raise KeyError
    assert current_mode() is OFF


def test_enabling_lasts_until_the_end_of_the_region():
    enable_batch_invariant_mode()
    enable_batch_invariant_mode()
    assert current_mode() == ON
    with set_batch_invariant_mode(False):
        enable_batch_invariant_mode(portable=True)
        assert current_mode() == Mode(portable=True)
    assert current_mode() == ON
    with set_batch_invariant_mode():
        disable_batch_invariant_mode()
        assert current_mode() is OFF
    assert current_mode() == ON
    disable_batch_invariant_mode()
    disable_batch_invariant_mode()
    assert current_mode() is OFF


def test_a_decorator():
    @set_batch_invariant_mode(portable=True)
    def depth(n):
        return [current_mode(), *depth(n - 1)] if n else []

    assert depth(2) == [Mode(portable=True)] * 2
    assert current_mode() is OFF


def test_arguments():
    with pytest.raises(ValueError, match="on_uncovered must be one of 'raise', 'warn', 'ignore', got 'log'"):
        enable_batch_invariant_mode(on_uncovered="log")
    block = bi_torch.get_batch_invariant_attention_block_size()
    assert block == bi_torch.AttentionBlockSize(block_m=16, block_n=16)
    assert set(mode.__all__) >= {name for name in bi_torch.__all__ if "batch_invariant" in name}


# ------------------------------------------------------------------------------------------------ threads and processes


def run_in_thread(function):
    results = []
    thread = threading.Thread(target=lambda: results.append(function()))
    thread.start()
    thread.join()
    return results[0]


def test_every_thread_sees_the_mode():
    x, w = draw(3, 40), draw(40, 5)
    with set_batch_invariant_mode():
        assert run_in_thread(current_mode) == ON
        assert_same(run_in_thread(lambda: torch.mm(x, w)), bi_torch.mm(x, w))
        run_in_thread(disable_batch_invariant_mode)
        assert current_mode() is OFF
    assert run_in_thread(current_mode) is OFF


def test_regions_of_threads_overlap():
    """The thread that entered first leaves first: the other's region holds until it ends."""
    entered, leave = threading.Event(), threading.Event()

    def region():
        with set_batch_invariant_mode(portable=True):
            entered.set()
            leave.wait(60)

    thread = threading.Thread(target=region)
    with set_batch_invariant_mode():
        thread.start()
        assert entered.wait(60)
        assert current_mode() == Mode(portable=True)
    assert current_mode() == Mode(portable=True)
    leave.set()
    thread.join()
    assert current_mode() is OFF


def test_the_backward_pass_of_another_thread():
    """A graph that torch recorded before runs its backward pass under the mode, on whichever thread."""
    x, w, g = draw(3, 40, dtype="float32").requires_grad_(), draw(40, 5, dtype="float32"), draw(3, 5, dtype="float32")
    y = torch.mm(x, w)
    with set_batch_invariant_mode():
        run_in_thread(lambda: y.backward(g))
    assert_same(x.grad, bi_torch.mm(g, w.t()))


def test_environment_variable():
    program = "import bi_torch.mode, threading; threading.Thread(target=lambda: print(bi_torch.mode.current_mode())).start()"
    environment = os.environ | {mode.switch.VARIABLE: "portable"}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "Mode(portable=True, on_uncovered='raise')", done.stderr


def test_environment_variable_with_another_value():
    with pytest.raises(ValueError, match="BI_TORCH_BATCH_INVARIANT must be 0, 1 or portable, got 'yes'"):
        mode.switch.enable_from_environment("yes")
    for value, expected in ((None, OFF), ("", OFF), ("0", OFF), ("1", ON)):
        mode.switch.enable_from_environment(value)
        assert current_mode() == expected


# ----------------------------------------------------------------------------------------------------------- refusals


def test_dtypes_that_the_contract_does_not_have():
    x = torch.randn(3, 4, dtype=torch.float64)
    with set_batch_invariant_mode():
        for function in (
            lambda: x @ x.t(),
            x.sum,
            lambda: F.layer_norm(x, (4,)),
            lambda: (x + 1j).mean(),
            lambda: x[0].dot(x[0]),
        ):
            with pytest.raises(
                UncoveredOperationError, match="aten::.* depends on the batch and is not covered.*float16.*not torch"
            ):
                function()
        assert x.max() == x.amax()  # exact in every dtype; torch prints tensors by it
        assert "float64" in repr(x)


def test_integers_are_exact():
    x = torch.arange(12).reshape(3, 4)
    with set_batch_invariant_mode():
        assert (x @ x.t()).dtype == torch.int64
        assert x.sum() == 66
        assert x.bool().sum() == 11
        assert x.prod() == 0
        assert x.addmm_(x @ x.t(), x) is x
        assert_same(x.sum(1, dtype=torch.float32), x.sum(1).float())


def test_policies():
    x = torch.randn(3, 4, dtype=torch.float64)
    with set_batch_invariant_mode(on_uncovered="warn"):
        with pytest.warns(UncoveredOperationWarning, match="aten::mm depends on the batch"):
            first = x.mm(x.t())
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            x.mm(x.t())
            with set_batch_invariant_mode(on_uncovered="ignore"):
                x.mm(x.t())
        assert uncovered_calls() == {"mm": 2}
        with set_batch_invariant_mode(), pytest.raises(UncoveredOperationError):
            x.mm(x.t())
    assert torch.equal(first, x.mm(x.t()))
    with set_batch_invariant_mode(on_uncovered="warn"):
        assert uncovered_calls() == {}


# ------------------------------------------------------------------------------------------------------------- models


class Model(nn.Module):
    """A little of everything: attention, convolution's place taken by linear, norms, activations, an embedding."""

    def __init__(self):
        super().__init__()
        self.tokens = nn.Embedding(20, 16)
        layer = nn.TransformerEncoderLayer(16, 4, 24, dropout=0.0, activation="gelu", batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.group_norm = nn.GroupNorm(4, 16)
        self.rms_norm = nn.RMSNorm(16)
        self.head = nn.Linear(16, 20)

    def forward(self, ids):
        x = self.encoder(self.tokens(ids))
        x = self.group_norm(x.transpose(1, 2)).transpose(1, 2)
        x = F.silu(self.rms_norm(x)) * torch.sigmoid(x) + F.softplus(x) - F.mish(x).abs().pow(2.5) * x.exp2()
        return self.head(x / (x.norm(dim=-1, keepdim=True) + x.std(-1, keepdim=True))).log_softmax(-1)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return Model().eval()


@pytest.mark.parametrize(("dtype", "portable"), [(torch.float32, False), (torch.bfloat16, True)])
def test_a_row_alone_is_the_row_in_a_batch(model, dtype, portable):
    model = model.to(dtype)
    ids = torch.randint(20, (4, 5))
    with set_batch_invariant_mode(portable=portable):
        with torch.inference_mode():
            batch = model(ids)
            assert_same(batch[2:3], model(ids[2:3]))
        with torch.no_grad():
            assert_same(model(ids[1:3]), batch[1:3].clone())
        assert_same(model(ids[3:]).detach(), batch[3:].clone())


def test_training(model):
    """Gradients of the inputs of a row alone are those of the row in a batch; parameters get theirs, the same in every run."""
    model = model.float()
    ids = torch.randint(20, (3, 5))
    taken = []
    handle = model.tokens.register_forward_hook(lambda module, args, output: taken.append(output) or output.retain_grad())
    runs = []
    with set_batch_invariant_mode():
        for rows in (slice(None), slice(2, 3), slice(None)):
            model.zero_grad()
            F.nll_loss(model(ids[rows]).flatten(0, 1), ids[rows].flatten(), reduction="sum").backward()
            runs.append({name: p.grad.clone() for name, p in model.named_parameters()})
    handle.remove()
    assert_same(taken[0].grad[2:3], taken[1].grad)
    for name, grad in runs[0].items():
        assert_same(grad, runs[2][name])
        assert grad.abs().sum() > 0, name


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x.sum(-1, keepdim=True),
        lambda x: x.mean(-1, keepdim=True),
        lambda x: F.linear(x, torch.ones(5, 6)),
        lambda x: torch.addmm(torch.ones(5), x, torch.ones(6, 5)),
        lambda x: torch.ones(2, 4) @ x,
    ],
)
def test_what_a_gradient_does_not_need_may_be_written_to(function):
    """As without the mode: a mixture of experts divides weights by their sum in place."""

    def gradient(change):
        leaf = torch.linspace(1, 2, 24).reshape(4, 6).requires_grad_()
        x = leaf * 1
        y = function(x)
        if change:
            x.add_(1)
        return torch.autograd.grad((y * y).sum(), leaf)[0]

    with set_batch_invariant_mode():
        assert_same(gradient(True), gradient(False))


ELEMENTWISE = {
    **{name: getattr(F, name) for name in ("silu", "gelu", "softplus", "mish")},
    **{name: getattr(torch, name) for name in ("sigmoid", "exp2")},
    "pow": lambda x: x.abs().pow(1.7),
    "pow of tensors": lambda x: x.abs().pow(x.flip(-1)),
    "number to the power": lambda x: torch.pow(1.7, x),
    "rsqrt": lambda x: x.abs().rsqrt(),
}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ELEMENTWISE)
def test_an_element_has_its_bits_wherever_it_stands(name, dtype):
    function = ELEMENTWISE[name]
    x = draw(20_001, dtype=dtype).clamp(-20, 20)
    strided = torch.stack((x, x), 1)[:, 0]
    with set_batch_invariant_mode():
        everywhere = function(x)
        assert_same(function(strided), everywhere)
        if name != "pow of tensors":
            for lo, hi in ((0, 1), (7, 8), (20_000, 20_001), (3, 50), (16_383, 16_390)):
                assert_same(function(x[lo:hi]), everywhere[lo:hi])
            assert_same(function(x[5]), everywhere[5])


def test_results_have_the_strides_of_torchs():
    x = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    for function in (F.gelu, F.silu, torch.sigmoid, torch.exp, lambda x: x.softmax(1), lambda x: x.transpose(1, 2).rsqrt()):
        with set_batch_invariant_mode(portable=True):
            ours = function(x)
        assert ours.stride() == function(x).stride()


def test_portable_functions_are_the_contracts():
    x = draw(50, dtype="float32").abs() + 0.5
    stock = {exponent: (-x) ** exponent for exponent in WITHOUT_POW}
    with set_batch_invariant_mode(portable=True):
        for name in ("exp", "log", "tanh", "sigmoid", "erf", "rsqrt", "sin", "cos"):
            assert_same(getattr(torch, name)(x), getattr(bi_torch, name)(x))
            assert_same(getattr(torch, f"{name}_")(x.clone()), getattr(bi_torch, name)(x))
        for name, function in elementary.FUNCTIONS.items():
            assert_same(getattr(torch, name)(x), function(x))
            assert_same(getattr(torch, f"{name}_")(x.clone()), function(x))
        y = draw(50, dtype="float32", seed=1)
        assert_same(x**y, elementary.power(x, y, x.dtype))
        assert_same(x**2.5, elementary.power(x, 2.5, x.dtype))
        assert_same(2.5**y, elementary.power(2.5, y, x.dtype))
        assert_same((x.to(torch.bfloat16)) ** 2.5, elementary.power(x.to(torch.bfloat16), 2.5, torch.bfloat16))
        for exponent in WITHOUT_POW:
            assert_same((-x) ** exponent, stock[exponent])
        assert torch.arange(5).pow(2).tolist() == [0, 1, 4, 9, 16]
    with set_batch_invariant_mode():
        assert_same(torch.exp(x), x.exp())


def test_dropout_in_attention():
    q = draw(2, 2, 5, 8, dtype="float32")
    with set_batch_invariant_mode():
        torch.manual_seed(0)
        dropped = F.scaled_dot_product_attention(q, q, q, dropout_p=0.5)
        assert (dropped != F.scaled_dot_product_attention(q, q, q)).any()
