"""What the mode replaces: every overload runs our function, in all forms, with its gradient, and means what torch means."""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from bi_torch.mode import overrides, set_batch_invariant_mode
from bi_torch.mode.override import overload
from tests.arrays import assert_same, draw


@dataclass(frozen=True)
class T:
    """A float tensor of a sample."""

    shape: tuple[int, ...]
    positive: bool = False
    scale: float = 1.0
    dtype: str = "float32"

    def tensor(self, seed: int) -> torch.Tensor:
        x = draw(*self.shape, dtype=self.dtype, seed=seed) * self.scale
        return x.abs() + 0.25 if self.positive else x


@dataclass(frozen=True)
class Sample:
    """A call of an overload.

    Attributes:
        name: of the overload.
        args: a `T` stands for a float tensor, a list of ints for an integer tensor.
        options: by keyword.
        tolerance: of results, relative to torch's own.
        gradient_of: so many arguments and results, from the first, have a gradient; None for all.
    """

    name: str
    args: tuple[Any, ...]
    options: dict[str, Any] = field(default_factory=dict)
    tolerance: float = 2e-6
    gradient_of: int | None = None

    def arguments(self) -> tuple[tuple[Any, ...], dict[str, Any]]:
        leaves, tree = pytree.tree_flatten((self.args, self.options), is_leaf=lambda x: isinstance(x, list))
        made = [
            leaf.tensor(seed)
            if isinstance(leaf, T)
            else [x.tensor(seed) for x in leaf]
            if isinstance(leaf, list) and leaf and isinstance(leaf[0], T)
            else leaf
            for seed, leaf in enumerate(leaves)
        ]
        return pytree.tree_unflatten(made, tree)

    def __str__(self) -> str:
        return self.name


def ids(*values: int) -> torch.Tensor:
    return torch.tensor(values)


F32 = torch.float32
CLASSES = torch.tensor([[[0, 1], [2, 0]], [[1, 1], [0, 2]]])
X = T((3, 4, 10))
HALF = T((3, 5), dtype="bfloat16")
M, V = T((5, 7)), T((7,))
SAMPLES = [
    Sample("mm", (M, T((7, 3)))),
    Sample("mm.dtype", (M, T((7, 3)), F32)),
    Sample("bmm", (T((2, 3, 7)), T((2, 7, 4)))),
    Sample("bmm.dtype", (T((2, 3, 7)), T((2, 7, 4)), F32)),
    Sample("addmm", (T((3,)), M, T((7, 3))), {"beta": 0.5, "alpha": 2}),
    Sample("addmm.dtype", (T((3,)), M, T((7, 3)), F32)),
    Sample("baddbmm", (T((2, 3, 4)), T((2, 3, 7)), T((2, 7, 4))), {"beta": 2}),
    Sample("baddbmm.dtype", (T((2, 3, 4)), T((2, 3, 7)), T((2, 7, 4)), F32)),
    Sample("addbmm", (T((3, 4)), T((2, 3, 7)), T((2, 7, 4))), {"alpha": 0.5}),
    Sample("mv", (M, V)),
    Sample("addmv", (T((5,)), M, V), {"beta": 3}),
    Sample("dot", (V, V)),
    Sample("vdot", (V, V)),
    Sample("addr", (M, T((5,)), V), {"alpha": 2}),
    Sample("linear", (T((2, 3, 7)), T((4, 7)), T((4,)))),
    Sample("linear", (T((2, 3, 7)), V, T(()))),
    Sample("matmul", (T((2, 1, 3, 7)), T((2, 7, 4)))),
    Sample("_grouped_mm", (T((6, 8)), T((2, 8, 8)), torch.tensor([2, 6], dtype=torch.int32))),
    Sample("scaled_dot_product_attention", (T((2, 4, 3, 8)), T((2, 2, 5, 8)), T((2, 2, 5, 8))), {"enable_gqa": True}),
    Sample("sum", (X,)),
    Sample("sum.dim_IntList", (X, [0, 2], True)),
    Sample("mean", (X,)),
    Sample("mean.dim", (X, [1])),
    Sample("nansum", (T((3, 4)), [1])),
    Sample("prod", (T((3, 5)),)),
    Sample("prod.dim_int", (X, 1, True)),
    Sample("var.correction", (X, [0, 2]), {"correction": 1}),
    Sample("std.correction", (X, [2]), {"correction": 0}),
    Sample("var_mean.correction", (X, [2]), {"keepdim": True}),
    Sample("std_mean.correction", (X,)),
    *(Sample("linalg_vector_norm", (X, p, [1])) for p in (2, 1, 0, math.inf, -math.inf, 3)),
    Sample("norm.Scalar", (X,)),
    Sample("norm.ScalarOpt_dtype", (X, 1), {"dtype": F32}),
    Sample("norm.ScalarOpt_dim", (X, None, [1], True)),
    Sample("norm.ScalarOpt_dim_dtype", (X, 2, [1], False), {"dtype": F32}),
    Sample("_foreach_norm.Scalar", ([X, M], 2)),
    Sample("logsumexp", (X, [0, 1])),
    Sample("amax", (X, [0, 1])),
    Sample("amin", (X, [])),
    Sample("aminmax", (X,), {"dim": 1}),
    Sample("max", (X,)),
    Sample("min", (X,)),
    Sample("softmax.int", (X, 1, F32)),
    Sample("log_softmax.int", (X, -1)),
    Sample("_softmax", (X, 1, False)),
    Sample("_log_softmax", (X, 2, False), tolerance=1e-5),
    Sample("_safe_softmax", (X, 1)),
    Sample("_softmax_backward_data", (T((3, 7)), T((3, 7), positive=True), 1, F32), tolerance=1e-5),
    Sample("_log_softmax_backward_data", (T((3, 7)), T((3, 7)), 0, F32), tolerance=1e-5),
    Sample("layer_norm", (X, [4, 10], T((4, 10)), T((4, 10))), tolerance=1e-5),
    Sample("native_layer_norm", (X, [10], T((10,)), None, 1e-5), tolerance=1e-5),
    Sample(
        "native_layer_norm_backward",
        (X, X, [10], T((3, 4, 1)), T((3, 4, 1), True), T((10,)), T((10,)), [True, True, True]),
        tolerance=1e-5,
    ),
    Sample("native_group_norm", (T((2, 6, 5)), T((6,)), T((6,)), 2, 6, 5, 3, 1e-5), tolerance=1e-5, gradient_of=1),
    Sample(
        "native_group_norm_backward",
        (T((2, 6, 5)), T((2, 6, 5)), T((2, 3)), T((2, 3), True), T((6,)), 2, 6, 5, 3, [True, True, True]),
        tolerance=1e-5,
    ),
    Sample("rms_norm", (X, [10], T((10,)), 1e-6)),
    Sample("_fused_rms_norm", (X, [10], T((10,)), 1e-6), gradient_of=1),
    Sample("_fused_rms_norm_backward", (X, X, [10], T((3, 4, 1), True), T((10,)), [True, True])),
    Sample("cross_entropy_loss", (T((4, 6)), ids(1, 5, -100, 0)), {"label_smoothing": 0.1}),
    Sample("nll_loss_forward", (T((4, 6)), ids(1, 5, 2, 0), T((6,), True), 1, 2), gradient_of=1),
    Sample("nll_loss_forward", (T((6,)), torch.tensor(4), None, 2, -100), gradient_of=1),
    Sample(
        "nll_loss2d_forward",
        (T((2, 3, 2, 2)), CLASSES, T((3,), True), 0, 1),
        gradient_of=1,
    ),
    Sample("nll_loss_backward", (T(()), T((4, 6)), ids(1, 5, 2, 0), T((6,), True), 1, 2, T((), True))),
    Sample("nll_loss2d_backward", (T((2, 2, 2)), T((2, 3, 2, 2)), CLASSES, T((3,), True), 0, 1, T((), True))),
    Sample("mse_loss", (X, X)),
    *(Sample("mse_loss_backward", (T(shape), X, X, reduction)) for shape, reduction in (((), 1), ((), 2), ((3, 4, 10), 0))),
    Sample("embedding_dense_backward", (T((2, 3, 4)), torch.tensor([[0, 4, 4], [1, 2, 0]]), 5, 1, False)),
    Sample("gelu", (X,), {"approximate": "tanh"}),
    Sample("gelu", (X,)),
    Sample("gelu_backward", (X, X)),
    Sample("gelu_backward", (X, X), {"approximate": "tanh"}, tolerance=1e-5),
    *(Sample(name, (X,)) for name in ("silu", "sigmoid", "exp", "tanh", "erf", "sin", "cos", "mish", "exp2", "expm1", "erfc")),
    *(Sample(name, (T((3, 5), True),)) for name in ("log", "rsqrt", "log1p", "log2")),
    Sample("silu_backward", (X, X)),
    Sample("glu", (X, 1)),
    *(Sample(name, (X,)) for name in ("sinh", "cosh", "elu", "softshrink", "special_i0e")),
    *(Sample(name, (X, T((4, 1)))) for name in ("logaddexp", "logaddexp2", "atan2", "hypot")),
    *(Sample(name, (T((3, 5), True), T((3, 5), True))) for name in ("igamma", "igammac")),
    Sample("elu_backward", (X, 0.5, 1, 1, False, X)),
    *(Sample(f"{name}.Tensor", (HALF, HALF), {"alpha": 0.3}, tolerance=0.03) for name in ("add", "sub")),
    Sample("logit", (X, 0.1)),
    Sample("atanh", (T((3, 5), scale=0.1),)),
    Sample("softplus", (X, 2, 3)),
    Sample("softplus_backward", (X, X, 2, 3)),
    Sample("mish_backward", (X, X)),
    Sample("pow.Tensor_Scalar", (T((3, 5), True), 1.7)),
    Sample("pow.Tensor_Tensor", (T((3, 5), True), T((5,)))),
    Sample("pow.Scalar", (1.7, X)),
    Sample("_foreach_div.ScalarList", ([X, HALF], [1.7, 3.0])),
    Sample("_foreach_div_.ScalarList", ([X, HALF], [1.7, 3.0])),
]
OVERRIDES = {override.name: override for override in overrides.OVERRIDES}
CUDA_ALONE = {name for name in OVERRIDES if not torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"aten::{name}", "CPU")}


NO_GRADIENT = {"aminmax", "igamma", "igammac", "_foreach_div_.ScalarList", *CUDA_ALONE}


def flat(result: Any) -> list[torch.Tensor]:
    return [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor)]


def call(name: str, args: tuple[Any, ...], options: dict[str, Any]) -> list[torch.Tensor]:
    return flat(overload(name)(*args, **options))


def differentiable(args: Any) -> tuple[Any, list[torch.Tensor]]:
    """The arguments with float tensors that require gradients, and these."""
    leaves, tree = pytree.tree_flatten(args)
    leaves = [
        x.detach().clone().requires_grad_() if isinstance(x, torch.Tensor) and x.is_floating_point() else x for x in leaves
    ]
    tensors = [x for x in leaves if isinstance(x, torch.Tensor) and x.requires_grad]
    return pytree.tree_unflatten(leaves, tree), tensors


def gradients(sample: Sample) -> list[torch.Tensor | None]:
    args, options = sample.arguments()
    (first, rest), count = (args[: sample.gradient_of], args[len(args[: sample.gradient_of]) :]), sample.gradient_of
    (first, options), tensors = differentiable((first, options))
    outputs = [y for y in call(sample.name, (*first, *rest), options)[:count] if y.requires_grad]
    cotangents = [torch.linspace(1, 2, y.numel(), dtype=y.dtype).reshape(y.shape) for y in outputs]
    return list(torch.autograd.grad(outputs, tensors, cotangents, allow_unused=True)) if outputs else []


class Log(TorchDispatchMode):
    """The ops that run below autograd."""

    def __init__(self) -> None:
        super().__init__()
        self.names: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func._name)
        return func(*args, **(kwargs or {}))


def test_every_override_has_a_sample() -> None:
    assert {sample.name for sample in SAMPLES} == set(OVERRIDES)


@pytest.fixture(scope="module")
def stock() -> dict[int, list[torch.Tensor]]:
    """What torch's own ops give, by the sample's place."""
    return {i: call(s.name, *s.arguments()) for i, s in enumerate(SAMPLES) if s.name not in CUDA_ALONE}


@pytest.fixture(scope="module")
def stock_gradients() -> dict[int, list[torch.Tensor | None]]:
    return {i: gradients(s) for i, s in enumerate(SAMPLES) if s.name not in NO_GRADIENT and "backward" not in s.name}


@pytest.fixture(scope="module")
def _on(stock: Any, stock_gradients: Any) -> Iterator[None]:
    with set_batch_invariant_mode(portable=True):
        yield


numbered = pytest.mark.parametrize(("i", "sample"), list(enumerate(SAMPLES)), ids=[f"{i}-{s}" for i, s in enumerate(SAMPLES)])


@numbered
@pytest.mark.usefixtures("_on")
def test_override(i: int, sample: Sample, stock: dict[int, list[torch.Tensor]]) -> None:
    """Our function runs, it means what torch's op means, and says the same in inference mode and without gradients."""
    override = OVERRIDES[sample.name]
    args, options = sample.arguments()
    direct = flat(override.function(*args, **options))
    with Log() as log:
        ours = call(sample.name, args, options)
    if override.autograd:
        assert f"aten::{sample.name}" not in log.names
    with torch.inference_mode():
        inferred = call(sample.name, *sample.arguments())
    with torch.no_grad():
        graphless = call(sample.name, *differentiable((args, options))[0])
    for others in (direct, inferred, graphless):
        for x, y in zip(ours, others, strict=True):
            assert_same(x, y)
    for x, y in zip(ours, stock.get(i, ours), strict=True):
        assert (x.shape, x.is_contiguous()) == (y.shape, y.is_contiguous())
        torch.testing.assert_close(x, y.to(x.dtype), rtol=sample.tolerance, atol=sample.tolerance)


@numbered
@pytest.mark.usefixtures("_on")
def test_gradient(i: int, sample: Sample, stock_gradients: dict[int, list[torch.Tensor | None]]) -> None:
    """The gradient is that of torch's op."""
    if i not in stock_gradients:
        return
    for x, y in zip(gradients(sample), stock_gradients[i], strict=True):
        if x is None or y is None:  # zeros that need not be written
            assert x is y or not torch.any(y if x is None else x)
        else:
            torch.testing.assert_close(x, y, rtol=2e-5, atol=2e-5)


@numbered
@pytest.mark.usefixtures("_on")
def test_forms(i: int, sample: Sample) -> None:
    """In-place and `out` forms have the bits of the functional form; an `out` is resized and returned."""
    override = OVERRIDES[sample.name]
    args, options = sample.arguments()
    expected = call(sample.name, args, options)
    if override.in_place and args[0].shape == expected[0].shape:
        target = args[0].clone()
        assert overload(override.in_place)(target, *args[1:], **options) is target
        assert_same(target, expected[0])
        if override.autograd:
            (first, *rest), _ = differentiable(args)
            changed = overload(override.in_place)(first * 1, *rest, **options)
            (functional, *rest), _ = differentiable(args)
            reference = overload(sample.name)(functional, *rest, **options)
            assert_same(torch.autograd.grad(changed.sum(), first)[0], torch.autograd.grad(reference.sum(), functional)[0])
    if override.out:
        names = [argument.name for argument in overload(override.out)._schema.arguments if argument.is_out]
        outs = {name: torch.empty(0, dtype=x.dtype) for name, x in zip(names, expected, strict=True)}
        result = flat(overload(override.out)(*args, **options, **outs))
        for value, wanted, out in zip(result, expected, outs.values(), strict=True):
            assert_same(value, wanted)
            assert value is out
        (tracked_args, _), tensors = differentiable((args, options))
        if override.autograd and tensors:
            with pytest.raises(RuntimeError, match="don't support automatic differentiation"):
                overload(override.out)(*tracked_args, **options, **outs)
