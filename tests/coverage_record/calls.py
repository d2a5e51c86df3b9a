"""The calls of aten operations that torch's own test database makes, forward and backward.

The database (OpInfo) holds sample inputs of some 700 functions. A dispatch mode below autograd notes every aten overload that
they really run, with its arguments: what the tests then compare is the kernel, not the function that a user calls.
"""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch._ops import OpOverload
from torch.testing._internal.common_methods_invocations import (
    foreach_binary_op_db,
    foreach_other_op_db,
    foreach_pointwise_op_db,
    foreach_reduce_op_db,
    foreach_unary_op_db,
    op_db,
)
from torch.testing._internal.opinfo.core import OpInfo
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SAMPLES = 24
MOST_ELEMENTS = 1 << 16


@dataclass
class Call:
    """One call of an aten overload: its tensors, and the rest of its arguments as a tree around them."""

    op: OpOverload
    leaves: list[Any]
    tree: pytree.TreeSpec

    @property
    def tensors(self) -> dict[int, torch.Tensor]:
        """Tensor leaves by their place."""
        return {place: leaf for place, leaf in enumerate(self.leaves) if isinstance(leaf, torch.Tensor)}

    def run(self, tensors: dict[int, torch.Tensor]) -> list[torch.Tensor]:
        """The tensors that the call returns for other tensors in the places of its own."""
        leaves = [tensors.get(place, leaf) for place, leaf in enumerate(self.leaves)]
        args, kwargs = pytree.tree_unflatten(leaves, self.tree)
        return [leaf for leaf in pytree.tree_leaves(self.op(*args, **kwargs)) if isinstance(leaf, torch.Tensor)]

    def arguments(self) -> dict[str, Any]:
        """Arguments by name, defaults included."""
        return named_arguments(self.op, *pytree.tree_unflatten(self.leaves, self.tree))

    def signature(self) -> tuple[Any, ...]:
        """What sets this call apart from others of the same overload."""
        return (
            str(self.op),
            str(self.tree),
            tuple((leaf.dtype, leaf.dim()) if isinstance(leaf, torch.Tensor) else repr(leaf) for leaf in self.leaves),
        )


def named_arguments(op: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """Arguments of a call of `op` by name, defaults included."""
    names = [argument.name for argument in op._schema.arguments]
    defaults = {argument.name: argument.default_value for argument in op._schema.arguments if argument.has_default_value()}
    return defaults | dict(zip(names, args, strict=False)) | kwargs


class _Recorder(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls: dict[tuple[Any, ...], Call] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        leaves, tree = pytree.tree_flatten((args, kwargs or {}))
        call = Call(func, leaves, tree)
        if func.namespace == "aten" and _plain(call) and (signature := call.signature()) not in self.calls:
            copies = [leaf.detach().clone() if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]
            self.calls[signature] = Call(func, copies, tree)
        return func(*args, **(kwargs or {}))


def _plain(call: Call) -> bool:
    return all(
        type(x) in (torch.Tensor, torch.nn.Parameter)
        and x.layout == torch.strided
        and not x.is_quantized
        and not x.is_complex()
        and x.numel() <= MOST_ELEMENTS
        for x in call.tensors.values()
    )


def database() -> list[OpInfo]:
    """The functions that the database knows, each with its variants; those of lists of tensors too."""
    lists = (foreach_unary_op_db, foreach_binary_op_db, foreach_pointwise_op_db, foreach_reduce_op_db, foreach_other_op_db)
    # jiterator's are kernels that a test writes itself.
    return [info for info in itertools.chain(op_db, *lists) if not info.name.startswith("jiterator")]


def calls_of(info: OpInfo, device: str, dtype: torch.dtype, samples: int = SAMPLES) -> Iterator[Call]:
    """Distinct aten calls of the first samples of one function, and of their gradients."""
    if dtype not in info.supported_dtypes(device):
        return
    torch.manual_seed(0)
    differentiable = info.supports_autograd and dtype in info.supported_backward_dtypes(device)
    cut = _first if info.name.startswith("_foreach") else _same  # one tensor of a list of tensors is enough
    recorder = _Recorder()
    for sample in itertools.islice(info.sample_inputs(device, dtype, requires_grad=differentiable), samples):
        try:
            with recorder:
                result = info.op(cut(sample.input), *map(cut, sample.args), **{k: cut(v) for k, v in sample.kwargs.items()})
            if differentiable:
                _run_backward(recorder, result, (sample.input, sample.args, sample.kwargs))
        except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
            if "CUDA error" in str(error):
                raise  # the process's GPU context is lost
    yield from recorder.calls.values()


def _first(argument: Any) -> Any:
    return argument[:1] if isinstance(argument, list) else argument


def _same(argument: Any) -> Any:
    return argument


def _run_backward(recorder: _Recorder, result: Any, inputs: Any) -> None:
    outputs = [x for x in pytree.tree_leaves(result) if isinstance(x, torch.Tensor) and x.requires_grad]
    wanted = [x for x in pytree.tree_leaves(inputs) if isinstance(x, torch.Tensor) and x.requires_grad]
    if outputs and wanted:
        gradients = [torch.randn_like(x) for x in outputs]
        with recorder:
            torch.autograd.grad(outputs, wanted, gradients, allow_unused=True)
