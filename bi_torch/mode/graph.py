"""The graphs that Inductor compiles under the mode: what it may generate itself, and what it has to call.

Code that Inductor generates has other bits than eager wherever a result is not fixed by its inputs alone: on a CPU a vector
of 16 elements and the few that remain take different `exp`; a fused operation does not round to 16 bits what eager rounds; a
reduction has the order of whatever tile was chosen. So Inductor generates only

- data movement: views, copies, conversions;
- selections, and operations on integers and bools, element by element;
- the floating-point arithmetic that IEEE 754 fixes, each result rounded to its dtype and no two operations contracted.

All else is a call through the dispatcher, of operations of ours, which are opaque, or of ATen's, where the mode's kernels stand
as they do in eager: what the mode replaces is replaced, and what depends on the batch is refused. The same lists decide what is
decomposed: only what becomes data movement.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import cache, wraps
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._inductor import compile_fx as inductor
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass, get_hash_for_files
from torch._inductor.decomposition import select_decomp_table
from torch._inductor.lowering import fallback_handler, lowerings
from torch._ops import HigherOrderOperator, OpOverload
from torch.fx import Graph, Node

import shared_specs
from bi_torch.mode.policy import report
from bi_torch.mode.switch import Mode
from bi_torch.mode.uncovered import named_arguments


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


_MOVES = _names(
    """alias as_strided as_strided_scatter cat clone constant_pad_nd convert_element_type copy copy_ detach device_put
    diagonal diagonal_scatter embedding empty empty_like empty_strided expand full gather index index_put lift
    lift_fresh_copy new_empty new_empty_strided permute repeat reshape scalar_tensor scatter select select_scatter slice
    slice_scatter split split_with_sizes squeeze unbind unfold _unsafe_index _unsafe_view unsqueeze view view_of where
    zeros"""
)
_ARITHMETIC = frozenset({"add", "sub", "mul", "div", "sqrt"})
_SELECTIONS = _names(
    "abs neg relu eq ne lt le gt ge isnan isinf logical_and logical_not logical_or logical_xor floor ceil trunc"
)
"""Nothing is rounded: the result is one of the operands, its integer part, or a bool."""

_CONSTANTS = {"full": 1, "scalar_tensor": 0, "constant_pad_nd": 2}
"""Moves of a number, and where it stands among the arguments: generated code does not round it to 16 bits."""

_SIGNS = frozenset({"neg", "relu", "clamp_min", "clamp_max"})
"""Those for which Triton's code gives a zero another sign than eager does: its -x is 0 - x."""

_DECOMPOSED = _names(
    """add alias_copy arange block_diag cat channel_shuffle conj_physical detach diag_embed diagonal_backward
    diagonal_copy empty_like empty_permuted expand_copy eye fill flip full full_like index_copy index_fill index_select
    isneginf isposinf lift masked_fill narrow_copy new_empty new_full new_ones new_zeros ones ones_like permute_copy
    pixel_shuffle pixel_unshuffle repeat_interleave roll rot90 rsub select_backward slice_backward split_with_sizes_copy
    squeeze_copy stack t t_copy threshold threshold_backward _to_copy transpose transpose_copy tril tril_indices triu
    triu_indices unbind_copy unfold_copy _unsafe_index_put unsafe_split unsafe_split_with_sizes _unsafe_view
    unsqueeze_copy view_copy zero zeros zeros_like"""
)
"""Operations whose decomposition is made of the above, beside those that ATen composes itself."""

_REDUCING = frozenset({"associative_scan", "flex_attention", "flex_attention_backward"})
"""Higher-order operators for which Inductor generates products and sums of its own."""

_HALF = frozenset({torch.bfloat16, torch.float16})
_INTEGERS = frozenset({torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64})
_KNOWN = _HALF | _INTEGERS | {torch.float32, torch.float64}

# This goes before what the caller of torch.compile asks for.
_CONFIGURATION: dict[str, Any] = {
    # Results in 16 bits are rounded after every operation, and Triton contracts nothing.
    "emulate_precision_casts": True,
    "eager_numerics.division_rounding": True,
    "eager_numerics.disable_ftz": True,
    "use_fast_math": False,
    "cpp.enable_unsafe_math_opt_flag": False,
    # Inductor passes -fno-signed-zeros, which lets a C++ compiler drop x + 0.0; what follows this flag revokes it.
    "cpp.enable_floating_point_contract_flag": "off -fsigned-zeros",
    # Random numbers are eager's.
    "fallback_random": True,
    # Patterns drop the rounding of x.bfloat16().float(), and folding makes x of x + 0.
    "pattern_matcher": False,
    "joint_graph_constant_folding": False,
    "freezing": False,
}


_installed = False


def install(state: Callable[[], Mode | None]) -> None:
    """Have Inductor compile every graph from now on for the state that the mode then has. Only the first call counts."""
    global _installed
    if _installed:
        return
    _installed = True
    stock = inductor.compile_fx

    @wraps(stock)
    def compile_fx(model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        mode = state()
        if mode is None or isinstance(config.post_grad_custom_post_pass, _Generated):  # inside a compilation, all is said
            return stock(model, inputs, *args, **kwargs)
        given = signature(stock).bind(model, inputs, *args, **kwargs).arguments
        with config.patch(given.get("config_patches") or {}):
            theirs = config.post_grad_custom_post_pass
        patches = _CONFIGURATION | {"post_grad_custom_post_pass": _Generated(mode, theirs)}
        given["config_patches"] = {**(given.get("config_patches") or {}), **patches}
        with config.patch(given["config_patches"]):
            rules = given.get("decompositions") or select_decomp_table()
        given["decompositions"] = {op: rule for op, rule in rules.items() if _is_decomposed(op)}
        return stock(**given)

    inductor.compile_fx = compile_fx  # type: ignore[assignment]


def _is_decomposed(op: Any) -> bool:
    if not isinstance(op, OpOverload):
        return False
    composite = torch._C._dispatch_has_kernel_for_dispatch_key(op.name(), "CompositeImplicitAutograd")
    return composite or _name(op) in _DECOMPOSED


@cache
def _sources() -> bytes:
    """A hash of all that decides what a traced graph holds."""
    roots = (Path(__file__).parents[1], Path(shared_specs.__file__).parent)
    files = (str(path) for root in roots for path in sorted(root.rglob("*")) if path.suffix in (".py", ".json"))
    return get_hash_for_files(tuple(files))


class _Generated(CustomGraphPass):
    """The pass that says what is generated and what is called; the last one, after the user's own."""

    def __init__(self, mode: Mode, theirs: Any) -> None:
        self._mode, self._theirs = mode, theirs

    def __call__(self, graph: Graph) -> None:
        if self._theirs is not None:
            self._theirs(graph)
        for node in list(graph.nodes):
            if isinstance(node.target, HigherOrderOperator) and node.target.name() in _REDUCING:
                report(node.target.name(), "the compiler generates its products and sums", self._mode.on_uncovered)
            if node.target is torch.ops.aten.pow.Tensor_Scalar and node.args[1] in (1, 2):
                node = _as_product(node) or node
            if isinstance(node.target, OpOverload) and node.target.namespace in ("aten", "prims"):
                _decide(node, _name(node.target))

    def uuid(self) -> Any:
        if self._theirs is None:
            return _sources(), repr(self._mode)
        theirs = self._theirs.uuid() if isinstance(self._theirs, CustomGraphPass) else None
        return theirs and (_sources(), repr(self._mode), theirs)  # None: a graph that is not to be cached


def _name(op: OpOverload) -> str:
    return op._schema.name.partition("::")[2]


def _decide(node: Node, name: str) -> None:
    """Have a node called, or generated with the roundings of eager."""
    results = [x for x in _flat(node.meta.get("val")) if isinstance(x, Tensor)]
    operands = [x for x in _values(node.all_input_nodes) if isinstance(x, Tensor)]
    devices = {x.device.type for x in (*results, *operands)}
    dtypes = {x.dtype for x in (*results, *operands)}
    if not results:
        return  # sizes and assertions
    if node.target not in lowerings or not _is_generated(node, name, operands, dtypes, devices):
        node.meta["should_fallback"] = True
        # Inductor has no lowering for what it expects to be decomposed.
        lowerings.setdefault(node.target, fallback_handler(node.target, add_to_fallback_set=False))
        return
    if name in _CONSTANTS and results[0].dtype in _HALF:
        _round_constant(node, _CONSTANTS[name], results[0].dtype)
    if dtypes & _HALF:
        node.meta["low_precision_pointwise_barrier"] = True
    if name in _ARITHMETIC and results[0].dtype in _HALF and not _fit(_scalars(node), dtypes):
        _in_float32(node)


def _is_generated(node: Node, name: str, operands: Sequence[Tensor], dtypes: set[torch.dtype], devices: set[str]) -> bool:
    floats = {dtype for dtype in dtypes if dtype.is_floating_point}
    if floats & _HALF and "cuda" not in devices and (len(floats) > 1 or name not in _MOVES):
        return False  # the C++ backend keeps in 32 bits what is to be rounded to 16
    if name in _MOVES or node.target.is_view:  # type: ignore[union-attr]
        return not _accumulates(node)
    if not dtypes <= _KNOWN:
        return False
    if not floats:
        return torch.Tag.pointwise in node.target.tags or name == "iota"  # type: ignore[union-attr]
    scalars = _scalars(node)
    if any(isinstance(x, torch.SymInt | torch.SymFloat) for x in _values(node.all_input_nodes)):
        return False
    if name in _SIGNS and "cuda" in devices:
        return False
    if name in _SELECTIONS:
        return _fit(scalars, dtypes)
    if name not in _ARITHMETIC or node.kwargs.get("alpha", 1) != 1 or "rounding_mode" in node.kwargs:
        return False
    if name == "div" and "cuda" in devices and not all(math.frexp(x)[0] in (0.5, -0.5) for x in scalars):
        return False  # eager multiplies by the reciprocal
    # Eager does not round an operand of no dimensions to 16 bits.
    return not dtypes & _HALF or all(x.dim() for x in operands) or len(dtypes) == 1


def _accumulates(node: Node) -> bool:
    """Whether a data movement adds to what it finds."""
    arguments = named_arguments(node.target, node.args, node.kwargs)  # type: ignore[arg-type]
    return bool(arguments.get("accumulate") or arguments.get("reduce"))


def _scalars(node: Node) -> list[float]:
    return [x for x in node.args if isinstance(x, int | float)]


def _fit(scalars: Sequence[float], dtypes: set[torch.dtype]) -> bool:
    """Whether scalars are the same in the 16-bit formats among `dtypes`."""
    return all(torch.tensor(x).to(dtype).item() == x for x in scalars for dtype in dtypes & _HALF)


def _round_constant(node: Node, i: int, dtype: torch.dtype) -> None:
    if len(node.args) > i and isinstance(node.args[i], int | float):
        node.update_arg(i, torch.tensor(node.args[i], dtype=dtype).item())


def _as_product(node: Node) -> Node | None:
    """x ** 2 and x ** 1, which is what the gradient of a square has, as eager computes them; None for integers ** 2.0."""
    x, exponent = node.args
    if x.meta["val"].dtype != node.meta["val"].dtype:  # type: ignore[union-attr]
        return None
    new = _before(node, torch.ops.aten.mul.Tensor, x, x) if exponent == 2 else _before(node, torch.ops.aten.clone.default, x)
    _replace(node, new)
    return new


def _in_float32(node: Node) -> None:
    """16-bit arithmetic with a scalar, written as what it is in eager: float32 arithmetic, rounded once."""
    convert, dtype = torch.ops.prims.convert_element_type.default, node.meta["val"].dtype
    wide = [_before(node, convert, x, torch.float32) if isinstance(x, Node) else x for x in node.args]
    _replace(node, _before(node, convert, _before(node, node.target, *wide), dtype))


def _before(node: Node, target: Any, *args: Any) -> Node:
    """A new call in front of a node, with the node's metadata."""
    with node.graph.inserting_before(node):
        new = node.graph.call_function(target, args)
    new.meta = {**node.meta, "val": target(*(x.meta["val"] if isinstance(x, Node) else x for x in args))}
    return new


def _replace(node: Node, new: Node) -> None:
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _values(nodes: Sequence[Node]) -> Iterator[Any]:
    for node in nodes:
        yield from _flat(node.meta.get("val"))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, list | tuple):
        for x in value:
            yield from _flat(x)
    else:
        yield value
