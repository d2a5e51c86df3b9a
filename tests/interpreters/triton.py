"""Triton's interpreter with the GPU's arithmetic, for tests.

The interpreter multiplies bfloat16 bit patterns as integers, truncates where the GPU rounds, rounds an fma twice and
keeps NaN payloads, drops NaN and the order of zeros in a maximum, reduces element by element, knows no builtins but its own
and no assembly, calls predicates numbers, and cannot read a scalar under NumPy 2.5. This module replaces exactly these: a
dot is the reference model's chain, conversions round to nearest even, fma, maximum and minimum are those of the reference
arithmetic, arithmetic gives the one NaN of the GPU, and a reduction halves its axis, after a check that its order cannot
matter.

The interpreter spends most of its time on describing types and shapes, which are few: they are kept here.
"""

import contextlib
import functools
import importlib.util
import math
import sys
from collections.abc import Iterator
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import pytest
import triton
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpretedFunction, InterpreterBuilder, ReduceOps, TensorHandle, interpreter_semantic

from bi_torch.rows.cuda import Launch
from shared_specs import BFLOAT16, FLOAT16, FLOAT32, HOPPER_DOT, ptx
from shared_specs.formats import FLOAT32_NAN
from shared_specs.reference import tensor_core
from shared_specs.reference.arithmetic import NumpyArithmetic

_F = NumpyArithmetic()
_FORMATS = {tl.bfloat16: BFLOAT16, tl.float16: FLOAT16, tl.float32: FLOAT32}


def interpreted(module: ModuleType, *copies: ModuleType) -> ModuleType:
    """A second copy of a module of `@triton.jit` functions, whose kernels run in the interpreter.

    Functions that it imports come from `copies` of their modules.
    """
    name = f"{module.__name__}_interpreted"
    spec = importlib.util.spec_from_file_location(name, module.__file__)
    assert spec is not None
    assert spec.loader is not None
    copy = importlib.util.module_from_spec(spec)
    sys.modules[name] = copy
    imported = {other.__name__.removesuffix("_interpreted"): other for other in copies}
    with triton.knobs.runtime.scope(), mock.patch.dict(sys.modules, imported):
        triton.knobs.runtime.interpret = True
        spec.loader.exec_module(copy)
    for key, value in vars(copy).items():
        if tl.core.is_builtin(value):
            setattr(copy, key, partial(value, _semantic=interpreter_semantic))
    return copy


@contextlib.contextmanager
def gpu_arithmetic() -> Iterator[None]:
    """Within the context, interpreted kernels compute as an H100 does."""
    unary, binary = InterpreterBuilder.unary_op, InterpreterBuilder.binary_op
    patches = {
        "create_dot": _dot,
        "create_inline_asm": _assembly,
        "create_fma": lambda self, x, y, z: _float(_F.fma(x.data, y.data, z.data)),
        "create_maximumf": lambda self, x, y: _float(_F.max(x.data, y.data)),
        "create_minimumf": lambda self, x, y: _float(_F.min(x.data, y.data)),
        "cast_impl": _cast(InterpreterBuilder.cast_impl),
        "create_fp_ext": lambda self, src, dst_type: self.cast_impl(src, dst_type),
        "create_fp_trunc": lambda self, src, dst_type: self.cast_impl(src, dst_type),
        "create_fp_to_fp": lambda self, src, dst_type, rounding_mode: self.cast_impl(src, dst_type),
        "unary_op": lambda self, arg, op: _result(unary(self, arg, op)),
        "binary_op": lambda self, lhs, rhs, op: _result(binary(self, lhs, rhs, op)),
    }
    index = mock.patch.object(interpreter, "_patch_lang_tensor", _patch_index(interpreter._patch_lang_tensor))
    reduction = mock.patch.object(ReduceOps, "apply_impl", _reduce)
    # The launch patches the language; every call of a device function would patch it again, which takes as long as the rest.
    call = mock.patch.object(InterpretedFunction, "__call__", lambda self, *args, **kwargs: self.rewrite()(*args, **kwargs))
    with mock.patch.multiple(InterpreterBuilder, **patches), index, reduction, call, _kept_types(), np.errstate(all="ignore"):
        yield


def interpreted_launches(kernels: ModuleType) -> Any:
    """A fixture in which launches prepared for a GPU run the kernels of the same names in `kernels`, which are interpreted."""

    @pytest.fixture
    def fixture(monkeypatch: pytest.MonkeyPatch) -> None:
        def launch(self: Launch, device: int, call: Any) -> None:
            with gpu_arithmetic():
                getattr(kernels, self.kernel.__name__)[(self.grid,)](*self.arguments(call), **self.options)

        monkeypatch.setattr(Launch, "__call__", launch)

    return fixture


_BLOCK_TYPES: dict[Any, dict[str, Any]] = {}
_NUMPY_TYPES: dict[str, np.dtype] = {}


@functools.cache
def _shape(extents: tuple[int, ...]) -> tuple[Any, Any]:
    """The number of elements and the shape of a tensor, as Triton writes them."""
    return tl.constexpr(math.prod(extents)), tl.tuple([tl.constexpr(extent) for extent in extents])


@contextlib.contextmanager
def _kept_types() -> Iterator[None]:
    original, numpy_type = tl.block_type.__init__, interpreter._get_np_dtype

    def block_type(self: Any, element_ty: Any, shape: Any) -> None:
        key = (element_ty.name, *(x.value if isinstance(x, tl.constexpr) else x for x in shape))
        if key not in _BLOCK_TYPES:
            original(self, element_ty, shape)
            _BLOCK_TYPES[key] = dict(vars(self))
        vars(self).update(_BLOCK_TYPES[key])

    def tensor(self: Any, handle: Any, type: Any) -> None:
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.numel, self.shape = _shape(tuple(type.shape) if type.is_block() else ())

    def np_dtype(type: Any) -> np.dtype:
        name = type.scalar.name
        if name not in _NUMPY_TYPES:
            _NUMPY_TYPES[name] = numpy_type(type)
        return _NUMPY_TYPES[name]

    with (
        mock.patch.object(tl.block_type, "__init__", block_type),
        mock.patch.object(tl.tensor, "__init__", tensor),
        mock.patch.object(interpreter, "_get_np_dtype", np_dtype),
    ):
        yield


def _patch_index(original: Any) -> Any:
    def patch(tensor: Any, scope: Any) -> None:
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patch


def _values(handle: TensorHandle) -> np.ndarray:
    fmt = _FORMATS[handle.dtype.scalar]
    return fmt.decode(np.ascontiguousarray(handle.data).view(fmt.storage))


def _dot(
    self: Any, a: TensorHandle, b: TensorHandle, d: TensorHandle, input_precision: Any, max_num_imprecise_acc: Any
) -> TensorHandle:
    fmt = _FORMATS[a.dtype.scalar]
    assert fmt.bits == 16, "a float32 dot would be TF32 on a GPU"
    return TensorHandle(tensor_core.chain(_values(a), _values(b), d.data, fmt, HOPPER_DOT), tl.float32)


def _assembly(
    self: Any, assembly: str, constraints: str, values: list[TensorHandle], types: list[Any], is_pure: bool, pack: int
) -> Any:
    """The assembly of our kernels: a register to another, parts of a float32, bfloat16 widened, extremes of pairs."""
    assert all(value.data.size % pack == 0 for value in values), "the compiler takes whole packs alone"
    if (assembly, constraints) == (ptx.SPLIT, ptx.SPLIT_REGISTERS):
        parts = _parts(values[0].data)
        return SimpleNamespace(get_result=lambda i: TensorHandle(parts[i], tl.bfloat16))
    if (assembly, constraints) == (ptx.WIDEN, ptx.WIDEN_REGISTERS):
        return SimpleNamespace(get_result=lambda i: TensorHandle(_values(values[0]), tl.float32))
    if constraints == "=r,r,r":
        kind, _, name = assembly.removesuffix(" $0, $1, $2;").split(".")
        fmt = _FORMATS[types[0].scalar]
        assert name == {BFLOAT16: "bf16x2", FLOAT16: "f16x2"}[fmt]
        bits = fmt.encode(getattr(_F, kind)(*map(_values, values)))
        extreme = TensorHandle(bits if fmt is BFLOAT16 else bits.view(fmt.name), types[0].scalar)
        return SimpleNamespace(get_result=lambda i: extreme)
    assert (assembly, constraints) == ("mov.b32 $0, $1;", "=r,r")
    return SimpleNamespace(get_result=lambda i: values[i])


def _parts(x: np.ndarray) -> list[np.ndarray]:
    """What `SPLIT` gives, instruction by instruction: a part toward zero, then two remainders rounded to nearest."""
    parts, rest = [np.where(np.isnan(x), 0x7FFF, x.view(np.uint32) >> 16).astype(np.uint16)], x
    for _ in range(2):
        rest = rest - BFLOAT16.decode(parts[-1])
        parts.append(BFLOAT16.encode(rest))
    return parts


def _reduce(self: Any, inputs: tuple[tl.tensor, ...]) -> tl.tensor:
    """Pairs of neighbours are combined until one is left; only maxima and minima may have more than one pair."""
    (x,), combine = inputs, self.combine_fn.fn
    values = np.moveaxis(x.handle.data, self.axis, 0)
    assert len(values) == 2 or combine.__name__ in ("_larger", "_smaller"), "the order of this reduction matters"
    while len(values) > 1:
        values = combine(self.to_tensor(values[0::2], x.dtype), self.to_tensor(values[1::2], x.dtype)).handle.data
    return self.to_tensor(np.moveaxis(values, 0, self.axis) if self.keep_dims else values[0], x.dtype)


def _float(data: np.ndarray) -> TensorHandle:
    return _result(TensorHandle(np.asarray(data), tl.float32))


def _cast(original: Any) -> Any:
    def cast(self: Any, src: TensorHandle, dst_type: Any) -> TensorHandle:
        source, target = _FORMATS.get(src.dtype.scalar), _FORMATS.get(dst_type.scalar)
        if source is None or target is None:
            return original(self, src, dst_type)
        bits = target.encode(_values(src))
        return TensorHandle(bits if target is BFLOAT16 else bits.view(target.name), dst_type.scalar)

    return cast


def _result(handle: TensorHandle) -> TensorHandle:
    """With the one NaN of the GPU; a comparison is labelled as the predicate that it is."""
    if handle.data.dtype == np.bool_:
        return TensorHandle(handle.data, tl.int1)
    if handle.data.dtype == np.float32 and (nan := np.isnan(handle.data)).any():
        return TensorHandle(np.where(nan, FLOAT32_NAN.view(np.float32), handle.data), handle.dtype.scalar)
    return handle
