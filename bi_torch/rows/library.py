"""Row ops registered with PyTorch's dispatcher: for CPU, CUDA, fake tensors and autograd.

An op is a thin shell over a program of `shared_specs.programs`, on [R, N] tensors. It is opaque to the compiler, which calls
it and cannot rewrite it. The families (`softmax`, `norm` and so on) register their ops here, next to their public functions.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad

from bi_torch.direct import keep, kernel_device, repeat, signature
from bi_torch.stock import runs_stock
from bi_torch.transforms import Function, record, to_front
from bi_torch.uncompiled import uncompiled
from shared_specs.rows import ColumnProgram, RowProgram

_LIBRARY = torch.library.Library("bi_torch", "FRAGMENT")

STATISTICS = ("mean", "rstd", "max", "log_sum", "norm", "factor")
"""Outputs that stay float32 whatever the dtype of the op; gradients need them and have none themselves."""

Key = tuple[Any, ...]
Program = RowProgram | ColumnProgram
Choose = Callable[[SimpleNamespace], Program]
Gradient = Callable[[SimpleNamespace, SimpleNamespace], Mapping[str, Tensor]]
"""A function (saved, cotangents) -> gradients by the name of the input.

`saved` holds what the op was told to keep and every argument that is no tensor, `dtypes` and `shapes` of those that are, by
name, and `needs`, the names of the inputs that want a gradient; `cotangents` holds one for each output, by name.
"""


class Op:
    """A registered op, called as its schema says.

    Args:
        schema: name, arguments and results; their names are those of the program.
        cpu, cuda, fake: kernels, with the schema's signature.
        keep: tensors, arguments or results, that the gradient needs.
        gradient: without one, asking for a gradient is an error.
        by_row: names of the arguments whose first dimension is that of the rows, where rows do not know of each other.
    """

    def __init__(
        self,
        schema: str,
        *,
        cpu: Callable[..., Any],
        cuda: Callable[..., Any],
        fake: Callable[..., Any],
        keep: tuple[str, ...] = (),
        gradient: Gradient | None = None,
        by_row: Callable[[SimpleNamespace], frozenset[str]] = lambda args: frozenset(),
    ) -> None:
        _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
        self.name = schema.partition("(")[0]
        self._overload = getattr(torch.ops.bi_torch, self.name).default
        self._arguments = [argument.name for argument in self._overload._schema.arguments]
        self.results = [result.name for result in self._overload._schema.returns]
        self._keep, self._gradient, self._by_row = keep, gradient, by_row
        self._kernels = {"cpu": runs_stock(cpu), "cuda": runs_stock(cuda)}
        for device, kernel in self._kernels.items():
            _LIBRARY.impl(self.name, uncompiled(kernel), device.upper())
        _LIBRARY.impl(self.name, fake, "Meta")
        _LIBRARY.impl(self.name, uncompiled(self._autograd()), "Autograd")
        torch.library.register_vmap(f"bi_torch::{self.name}", self._vmap, lib=_LIBRARY)

    def __call__(self, *args: Any) -> Any:
        """The op, through the dispatcher where that matters."""
        device = kernel_device(args)
        return self._overload(*args) if device is None else self._kernels[device](*args)

    def _below_autograd(self, *args: Any) -> Any:
        """The op without its gradient."""
        device = kernel_device(args)
        if device is not None:
            return self._kernels[device](*args)
        with torch._C._AutoDispatchBelowAutograd():
            return self._overload(*args)

    def _differentiated(self, args: tuple[Any, ...]) -> bool:
        """True if a gradient is to be recorded."""
        tensors = [x for x in args if isinstance(x, Tensor)]
        if forward_ad._current_level >= 0 and any(forward_ad.unpack_dual(x).tangent is not None for x in tensors):
            raise RuntimeError(f"bi_torch.{self.name} has no gradient in forward mode")
        return torch.is_grad_enabled() and any(x.requires_grad for x in tensors)

    def arguments(self, args: tuple[Any, ...]) -> SimpleNamespace:
        """Arguments by name."""
        return SimpleNamespace(**dict(zip(self._arguments, args, strict=True)))

    def positions(self, names: Iterable[str]) -> tuple[int, ...]:
        """Where arguments stand."""
        return tuple(self._arguments.index(name) for name in names)

    def _autograd(self) -> Callable[..., Any]:
        """The kernel that records the gradient."""
        op = self

        class Recorded(Function):
            @staticmethod
            def forward(ctx: Any, *args: Any) -> Any:
                output = op._below_autograd(*args)
                op._set_up_context(ctx, args, output)
                return output

            @staticmethod
            def backward(ctx: Any, *cotangents: Any) -> Any:
                return op._backward(ctx, *cotangents)

        def kernel(*args: Any) -> Any:
            return record(Recorded, *args) if op._differentiated(args) else op._below_autograd(*args)

        return kernel

    def _vmap(self, info: Any, in_dims: tuple[int | None, ...], *args: Any) -> tuple[Any, Any]:
        """More rows, where all that has the batch dimension belongs to a row; else one call after another."""
        size, names = info.batch_size, dict(zip(self._arguments, in_dims, strict=True))
        by_row = self._by_row(self.arguments(args))
        if all(dim is None or name in by_row for name, dim in names.items()):
            folded = [
                to_front(x, dim, size).flatten(0, 1) if name in by_row and isinstance(x, Tensor) else x
                for (name, dim), x in zip(names.items(), args, strict=True)
            ]
            outputs = [y.unflatten(0, (size, -1)) for y in _several(self(*folded))]
        else:
            each = [
                _several(self(*(x if dim is None else x.select(dim, i) for x, dim in zip(args, in_dims, strict=True))))
                for i in range(size)
            ]
            outputs = [torch.stack(ys) for ys in zip(*each, strict=True)]
        return (outputs[0], 0) if len(outputs) == 1 else (tuple(outputs), (0,) * len(outputs))

    def _set_up_context(self, ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        results = dict(zip(self.results, output if isinstance(output, tuple) else (output,), strict=True))
        arguments = vars(self.arguments(inputs))
        tensors = {name: x for name, x in arguments.items() if isinstance(x, Tensor)}
        ctx.save_for_backward(*((tensors | results).get(name) for name in self._keep))
        ctx.plain = {name: x for name, x in arguments.items() if name not in tensors}
        ctx.dtypes = {name: x.dtype for name, x in tensors.items()}
        ctx.shapes = {name: x.shape for name, x in tensors.items()}
        ctx.mark_non_differentiable(*(x for name, x in results.items() if name in STATISTICS))

    def _backward(self, ctx: Any, *cotangents: Tensor) -> tuple[Tensor | None, ...]:
        if self._gradient is None:
            raise RuntimeError(f"bi_torch.{self.name} has no gradient; second-order gradients of row ops are not available")
        kept = dict(zip(self._keep, ctx.saved_tensors, strict=True))
        needs = {name for name, needed in zip(self._arguments, ctx.needs_input_grad, strict=True) if needed}
        saved = SimpleNamespace(**(ctx.plain | kept), dtypes=ctx.dtypes, shapes=ctx.shapes, needs=needs)
        gradients = self._gradient(saved, SimpleNamespace(**dict(zip(self.results, cotangents, strict=True))))
        return tuple(gradients.get(name) if name in needs else None for name in self._arguments)


class RowOp(Op):
    """The op of a program, or of a choice of programs by the arguments.

    Arguments are the program's inputs, scalars and integers by name; an input that a variant lacks is optional. A result with
    the name of an input has its dtype; others have that of the argument `dtype`, or float32.
    """

    def __init__(
        self, schema: str, program: Program | Choose, *, keep: tuple[str, ...] = (), gradient: Gradient | None = None
    ) -> None:
        self._program = program
        self._calls: dict[Key, _Call] = {}  # on a GPU
        kernels = {"cpu": self._cpu, "cuda": self._cuda, "fake": self._fake}
        super().__init__(schema, **kernels, keep=keep, gradient=gradient, by_row=self._of_a_row)

    def on_views(
        self, given: tuple[Any, ...], views: Callable[[], tuple[Any, ...]], restore: Callable[..., Any], *options: Any
    ) -> Any:
        """restore(results) of the op on `views()`, which makes arguments of what a public function was given.

        On a GPU this is done once for all that have the same key. A kernel sees where a tensor's elements begin, and of shapes
        and strides what its plan says; so the launches can be repeated on what is given, and write to tensors of the shapes
        that `restore` makes, if nothing is copied on the way. Checks in `views` are not repeated either.

        Args:
            given: in the order of the op's arguments.
            views: the op's arguments; tensors are views of the same elements.
            restore: gives views of all results in the order of the schema.
            options: all else that `views` and `restore` depend on.
        """
        key = (options, *map(signature, given)) if kernel_device(given) == "cuda" else None
        call = None if key is None else self._calls.get(key)
        if call is not None:
            return repeat(call, given)
        args = views()
        outputs = _several(self(*args))
        results = restore(*outputs)
        if key is not None:
            self._keep_views(key, given, args, outputs, _several(results))
        return results

    def _keep_views(
        self, key: Key, given: tuple[Any, ...], args: tuple[Any, ...], outputs: tuple[Tensor, ...], results: tuple[Tensor, ...]
    ) -> None:
        """Keep the call on `args` for what they are views of, unless something was copied."""
        call = self._calls.get(self._key_of(args))
        viewed = map(_same_memory, (*args, *outputs), (*given, *results))
        if call is not None and call.as_they_are and all(viewed) and all(y.is_contiguous() for y in results):
            shapes = {name: tuple(y.shape) for name, y in zip(self.results, results, strict=True)}
            alone = _without_statistics(call.program)
            first = None if alone is None else _Call.of(self, alone, args, self.results[:1]).shaped(shapes)
            keep(self._calls, key, replace(call.shaped(shapes), first=first))

    def _key_of(self, args: tuple[Any, ...]) -> Key:
        return (None, *map(signature, args))

    def _chosen(self, e: SimpleNamespace) -> Program:
        return self._program if isinstance(self._program, Program) else self._program(e)

    def _cpu(self, *args: Any) -> Any:
        e = self.arguments(args)
        return _pack(_run(_cpu(), self._chosen(e), e, self.results), self.results)

    def _cuda(self, *args: Any) -> Any:
        key = self._key_of(args)
        call = self._calls.get(key)
        if call is None:
            call = _Call.of(self, self._chosen(self.arguments(args)), args, self.results)
            keep(self._calls, key, call)
        return call(args)

    def _fake(self, *args: Any) -> Any:
        e = self.arguments(args)
        return _pack(_new_outputs(self._chosen(e), e, self.results), self.results)

    def _of_a_row(self, e: SimpleNamespace) -> frozenset[str]:
        p = self._chosen(e)
        return frozenset() if isinstance(p, ColumnProgram) else frozenset({*p.elements, *p.rows, *p.ids})


@dataclass(frozen=True)
class _Call:
    """A call of a program on a GPU, for all arguments with the same key.

    Attributes:
        plan: the launches.
        tensors, scalars, integers: the program's arguments by their positions among the op's.
        as_they_are: no tensor has to be copied before the launch.
        first: the same, of the first result alone, where the others are statistics of the rows.
    """

    op: RowOp
    program: Program
    results: list[str]
    plan: Any
    tensors: tuple[int, ...]
    scalars: tuple[int, ...]
    integers: tuple[int, ...]
    as_they_are: bool
    first: "_Call | None" = None

    @staticmethod
    def of(op: RowOp, program: Program, args: tuple[Any, ...], results: list[str]) -> "_Call":
        e = op.arguments(args)
        given = _operands(program, e)
        plan = _cuda().prepare(program, list(given.values()), {name: _out_dtype(name, e) for name in results})
        tensors, scalars = op.positions(given), op.positions(program.scalars)
        integers = op.positions(program.integers) if isinstance(program, RowProgram) else ()
        as_they_are = all(x is getattr(e, name) for name, x in given.items())
        return _Call(op, program, results, plan, tensors, scalars, integers, as_they_are)

    def shaped(self, shapes: Mapping[str, tuple[int, ...]]) -> "_Call":
        """With results of these shapes."""
        return replace(self, plan=self.plan.with_shapes(shapes))

    def __call__(self, args: Sequence[Any]) -> Any:
        if self.as_they_are:
            given = [args[i] for i in self.tensors]
        else:
            given = list(_operands(self.program, self.op.arguments(tuple(args))).values())
        scalars, integers = tuple([float(args[i]) for i in self.scalars]), tuple([int(args[i]) for i in self.integers])
        return _pack(self.plan.run(given, scalars, integers), self.results)


def in_place_op(schema: str, program: Callable[[SimpleNamespace], RowProgram]) -> Callable[..., None]:
    """The op of a program whose outputs replace the arguments of the same names; it has no gradient."""
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    name = schema.partition("(")[0]
    overload = getattr(torch.ops.bi_torch, name).default
    names = [argument.name for argument in overload._schema.arguments]

    def kernel(engine: Callable[[], ModuleType]) -> Callable[..., None]:
        def run(*args: Any) -> None:
            e = SimpleNamespace(**dict(zip(names, args, strict=True)))
            chosen = program(e)
            _run(engine(), chosen, e, list(chosen.outputs), {name: getattr(e, name) for name in chosen.outputs})

        return run

    kernels = {"CPU": runs_stock(kernel(_cpu)), "CUDA": runs_stock(kernel(_cuda)), "Meta": lambda *args: None}
    for key, function in kernels.items():
        _LIBRARY.impl(name, uncompiled(function), key)
    return overload


@cache
def _cpu() -> ModuleType:
    from bi_torch.rows import cpu

    return cpu


@cache
def _cuda() -> ModuleType:
    from bi_torch.rows import cuda  # imports Triton

    return cuda


@cache
def _without_statistics(program: Program) -> RowProgram | None:
    """A program of one output and statistics of the rows, without the statistics."""
    if isinstance(program, RowProgram) and len(program.outputs) == 1 and program.row_outputs:
        return replace(program, name=f"{program.name} alone", row_outputs={})
    return None


def _run(
    engine: ModuleType, program: Program, e: SimpleNamespace, results: list[str], outs: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    inputs = _operands(program, e)
    scalars = {name: getattr(e, name) for name in program.scalars}
    dtypes = {name: _out_dtype(name, e) for name in results}
    if isinstance(program, ColumnProgram):
        return engine.run_columns(program, inputs, scalars, dtypes)
    scalars |= {name: getattr(e, name) for name in program.integers}
    return engine.run_rows(program, inputs, scalars, dtypes, outs=outs)


def _operands(program: Program, e: SimpleNamespace) -> dict[str, Tensor]:
    """The inputs of a program as the engines take them, in their order."""
    inputs = {name: _with_rows(getattr(e, name)) for name in program.elements}
    inputs |= {name: getattr(e, name).contiguous() for name in program.columns}
    inputs |= {name: getattr(e, name).to(torch.float32).contiguous() for name in program.rows}
    if isinstance(program, RowProgram):
        inputs |= {name: getattr(e, name).contiguous() for name in program.ids}
    return inputs


def _same_memory(x: Any, y: Any) -> bool:
    """Whether tensors begin at one place, and hold values of one dtype; what is no tensor is as it was given."""
    return not isinstance(x, Tensor) or (x.data_ptr() == y.data_ptr() and x.dtype == y.dtype)


def _with_rows(x: Tensor) -> Tensor:
    """A matrix whose rows are contiguous."""
    return x if x.stride(1) == 1 or x.shape[1] == 1 else x.contiguous()


def _new_outputs(program: Program, e: SimpleNamespace, results: list[str]) -> dict[str, Tensor]:
    like = getattr(e, program.elements[0])
    rows, columns = like.shape
    outputs = {}
    for name in results:
        if isinstance(program, ColumnProgram):
            shape: tuple[int, ...] = (columns,)
        else:
            shape = (rows, columns) if name in program.outputs else (rows,)
        outputs[name] = like.new_empty(shape, dtype=_out_dtype(name, e))
    return outputs


def _out_dtype(name: str, e: SimpleNamespace) -> torch.dtype:
    if name in STATISTICS:
        return torch.float32
    replaced = getattr(e, name, None)
    return replaced.dtype if isinstance(replaced, Tensor) else getattr(e, "dtype", torch.float32)


def _pack(outputs: Mapping[str, Tensor], results: list[str]) -> Any:
    return outputs[results[0]] if len(results) == 1 else tuple(outputs[name] for name in results)


def _several(result: Any) -> tuple[Tensor, ...]:
    return result if isinstance(result, tuple) else (result,)
