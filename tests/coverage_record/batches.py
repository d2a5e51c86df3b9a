"""Does a call give a row the same bits alone, in a batch, at an offset and strided?

Nothing is known of an operation beforehand. An axis of its inputs is a batch axis if slicing them along it slices the outputs,
up to rounding; that is tried on the database's small inputs. Then the inputs grow, along the batch axis and along the
others, and slices of the large call are compared with calls on slices, bit for bit.
"""

import contextlib
import itertools
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import lru_cache

import torch

from tests.coverage_record.calls import Call

Tensors = dict[int, torch.Tensor]

BATCH = 64
ROW_LENGTHS = (33, 4999, None)
SLICES = ((0, 1), (5, 1), (63, 1), (2, 2), (7, 3), (40, 17))
LAYOUTS = ("contiguous", "offset", "strided")
MOST_ELEMENTS = 1 << 19
MOST_CANDIDATES = 96
MOST_AXES = 2


@dataclass(frozen=True)
class Axis:
    """A batch axis of a call: the dimension of each sliced input, by its place, and that of each sliced output."""

    inputs: tuple[tuple[int, int], ...]
    outputs: tuple[tuple[int, int], ...]


@dataclass
class Evidence:
    """What the calls of one aten overload showed, on one device."""

    floating: bool = False  # a floating tensor goes in or comes out
    computes: bool = False  # an output holds a value that is neither an input's nor 0, 1 or -1
    mixes: bool = False  # a dimension of an input or an output is no batch axis
    unstable: bool = False  # the same call gave other bits a second time
    compared: int = 0
    differs: set[str] = field(default_factory=set)  # dtypes for which a row's bits changed

    def merge(self, other: "Evidence") -> None:
        """Add what other calls showed."""
        self.floating |= other.floating
        self.computes |= other.computes
        self.mixes |= other.mixes
        self.unstable |= other.unstable
        self.compared += other.compared
        self.differs |= other.differs


def examine(call: Call, dtype: torch.dtype, lengths: tuple[int | None, ...] = ROW_LENGTHS) -> Evidence:
    """Evidence from one call, with rows of these lengths; None is the call's own."""
    found = Evidence()
    outputs = call.run(lay_out(call.tensors, "contiguous"))
    floats = [place for place, x in enumerate(outputs) if _inexact(x)]
    found.floating = bool(floats) or any(map(_inexact, call.tensors.values()))
    if not floats:
        return found
    found.unstable = not _same_bits(outputs, call.run(lay_out(call.tensors, "contiguous")))
    if found.unstable:
        return found
    found.computes = any(not _moved(outputs[place], call) for place in floats)
    if not found.computes:
        return found
    axes = list(itertools.islice(batch_axes(call, outputs), 16))
    found.mixes = _mixes(call, outputs, axes)
    for axis in axes[:MOST_AXES]:
        for length in lengths:
            same = _compare(call, axis, length)
            if same is not None:
                found.compared += 1
            if same is False:
                found.differs.add(str(dtype).removeprefix("torch."))
                return found
    return found


def _mixes(call: Call, outputs: list[torch.Tensor], axes: list[Axis]) -> bool:
    """Whether some dimension of a floating input or output is no batch axis."""
    results = ((place, dim) for place, x in enumerate(outputs) if _inexact(x) for dim, n in enumerate(x.shape) if n > 1)
    inputs = ((place, dim) for place, x in call.tensors.items() if _inexact(x) for dim, n in enumerate(x.shape) if n > 1)
    sliced_results = {pair for axis in axes for pair in axis.outputs}
    sliced_inputs = {pair for axis in axes for pair in axis.inputs}
    return not (sliced_results.issuperset(results) and sliced_inputs.issuperset(inputs))


def batch_axes(call: Call, outputs: list[torch.Tensor]) -> Iterator[Axis]:
    """Axes along which slices of the inputs give slices of the outputs, up to rounding."""
    floats = {place: x for place, x in enumerate(outputs) if _inexact(x)}
    sizes = sorted({n for x in floats.values() for n in x.shape if n > 1})
    for size in sizes:
        places = list(call.tensors)
        options = [[None, *(dim for dim, n in enumerate(call.tensors[place].shape) if n == size)] for place in places]
        candidates = sorted(itertools.product(*options), key=lambda dims: dims.count(None))
        for dims in candidates[:MOST_CANDIDATES]:
            inputs = tuple((place, dim) for place, dim in zip(places, dims, strict=True) if dim is not None)
            if inputs and (found := _output_axes(call, inputs, floats, size)):
                yield Axis(inputs, found)


def _output_axes(
    call: Call, inputs: tuple[tuple[int, int], ...], floats: Tensors, size: int
) -> tuple[tuple[int, int], ...] | None:
    axes = {(place, dim) for place, x in floats.items() for dim, n in enumerate(x.shape) if n == size}
    for start in (0, size - 1):
        results = _run(call, _narrow(call.tensors, inputs, start, 1))
        if results is None:
            return None
        axes = {
            (place, dim)
            for place, dim in axes
            if place < len(results) and _close(results[place], floats[place].narrow(dim, start, 1))
        }
        if not axes:
            return None
    return tuple(sorted(axes))


def _compare(call: Call, axis: Axis, length: int | None) -> bool | None:
    """Are slices of a large call and calls on slices the same bits? None if the call does not take such sizes."""
    large = grow(call.tensors, axis, length)
    if large is None or (batch := _run(call, lay_out(large, "contiguous"))) is None:
        return None
    if any(place >= len(batch) or batch[place].dim() <= dim or batch[place].shape[dim] != BATCH for place, dim in axis.outputs):
        return None
    verdict: bool | None = None
    for (start, count), layout in zip(SLICES, itertools.cycle(LAYOUTS)):
        rows = _run(call, lay_out(_narrow(large, axis.inputs, start, count), layout, dict(axis.inputs)))
        if rows is None:
            return None
        for place, dim in axis.outputs:
            expected = batch[place].narrow(dim, start, count)
            if _same_bits([rows[place]], [expected]):
                verdict = True if verdict is None else verdict
            elif _close(rows[place], expected):
                return False
            else:
                return None  # growing has made it another call, whose axis is no batch axis
    return verdict


def grow(tensors: Tensors, axis: Axis, length: int | None) -> Tensors | None:
    """Larger inputs with values like theirs: 64 slices along `axis`, `length` elements along the inputs' last other axis.

    None if there is no such axis, or the inputs would be too large.
    """
    sliced = dict(axis.inputs)
    old = None
    if length is not None:
        lengths = (
            x.shape[dim]
            for place, x in tensors.items()
            if _inexact(x)
            for dim in reversed(range(x.dim()))
            if dim != sliced.get(place) and x.shape[dim] > 1
        )
        old = next(lengths, None)
        if old is None and any(x.dim() != (place in sliced) for place, x in tensors.items()):
            return None
    shapes = {}
    for place, x in tensors.items():
        shape = [BATCH if dim == sliced.get(place) else length if n == old else n for dim, n in enumerate(x.shape)]
        if length is not None and old is None and shape:
            shape.append(length)  # one element a slice becomes a row
        shapes[place] = tuple(shape)
    if _too_large(shapes.values()):
        return None
    return {place: _drawn(x, shapes[place]) if shapes[place] != x.shape else x for place, x in tensors.items()}


def _too_large(shapes: Iterable[tuple[int, ...]]) -> bool:
    """Whether an input, or what the inputs are broadcast to, has too many elements to be quick."""
    shapes = list(shapes)
    with contextlib.suppress(RuntimeError):
        shapes.append(tuple(torch.broadcast_shapes(*shapes)))
    return any(math.prod(shape) > MOST_ELEMENTS for shape in shapes)


def _drawn(x: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Values of x drawn at random; floating ones shrink by up to a quarter, which keeps a function's domain."""
    if x.numel() == 0:
        return x.new_empty(shape)
    places, factors = _draw(x.numel(), shape, str(x.device))
    values = x.flatten()[places]
    return (values * factors).to(x.dtype) if x.is_floating_point() else values


@lru_cache(maxsize=32)
def _draw(count: int, shape: tuple[int, ...], device: str) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(count, shape, generator=generator)
    return places.to(device), (1 - 0.25 * torch.rand(shape, generator=generator)).to(device)


def lay_out(tensors: Tensors, layout: str, axes: dict[int, int] | None = None) -> Tensors:
    """Copies: contiguous; odd distances between rows and a start off any alignment; or the batch axis innermost."""
    return {place: _laid_out(x, layout, (axes or {}).get(place)) for place, x in tensors.items()}


def _laid_out(x: torch.Tensor, layout: str, axis: int | None) -> torch.Tensor:
    if layout == "contiguous" or x.dim() == 0:
        return x.clone(memory_format=torch.contiguous_format)
    if layout == "offset":
        room = x.new_zeros((*x.shape[:-1], x.shape[-1] + 3))
        copy = room[..., 1 : 1 + x.shape[-1]]
    else:  # the axis of slices innermost, two elements apart
        order = [dim for dim in range(x.dim()) if dim != axis] + ([axis] if axis is not None else [])
        room = x.new_zeros([*(x.shape[dim] for dim in order), 2])[..., 0]
        copy = room.permute([order.index(dim) for dim in range(x.dim())])
    return copy.copy_(x)


def _narrow(tensors: Tensors, axes: tuple[tuple[int, int], ...], start: int, count: int) -> Tensors:
    return tensors | {place: tensors[place].narrow(dim, start, count) for place, dim in axes}


def _run(call: Call, tensors: Tensors) -> list[torch.Tensor] | None:
    try:
        return call.run(lay_out(tensors, "contiguous") if call.op._schema.is_mutable else tensors)
    except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
        if "CUDA error" in str(error):
            raise
        return None


def _inexact(x: torch.Tensor) -> bool:
    return x.is_floating_point() or x.is_complex()


def _moved(output: torch.Tensor, call: Call) -> bool:
    """Whether every value is an input's, a number among the arguments, or 0, 1, -1, inf or NaN."""
    if output.is_complex():
        return False
    numbers = [float(leaf) for leaf in call.leaves if isinstance(leaf, int | float)]
    constants = torch.tensor([0.0, 1.0, -1.0, math.inf, -math.inf, *numbers], device=output.device).to(output.dtype)
    known = torch.cat([constants, *(x.flatten() for x in call.tensors.values() if x.dtype == output.dtype)])
    return bool((torch.isin(output, known) | output.isnan()).all())


def _close(x: torch.Tensor, y: torch.Tensor) -> bool:
    """Whether the results may be the same but for rounding, on the scale of the largest."""
    if x.shape != y.shape or x.dtype != y.dtype:
        return False
    if not _inexact(x):
        return torch.equal(x, y)
    tolerance = 0.06 if x.itemsize == 2 else 1e-3
    wide = torch.complex128 if x.is_complex() else torch.float64
    scale = y.abs().double().nan_to_num(0, 0, 0).max() if y.numel() else 0
    return torch.allclose(x.to(wide), y.to(wide), rtol=tolerance, atol=tolerance * float(scale), equal_nan=True)


def _same_bits(xs: list[torch.Tensor], ys: list[torch.Tensor]) -> bool:
    return all(_same(x, y) for x, y in zip(xs, ys, strict=True))


def _same(x: torch.Tensor, y: torch.Tensor) -> bool:
    if x.shape != y.shape:
        return False
    if x.is_complex():
        return _same(torch.view_as_real(x), torch.view_as_real(y))
    if not x.is_floating_point():
        return torch.equal(x, y)
    bits = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.itemsize]
    xs, ys = x.contiguous().view(bits), y.contiguous().view(bits)
    return torch.equal(xs, ys) or bool(((xs == ys) | (x.isnan() & y.isnan())).all())
