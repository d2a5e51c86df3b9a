"""Launches the Triton kernels: which kernel, which schedule, which grid.

Everything that depends on shapes, strides and dtypes alone is decided once and kept as a `Plan`, so that a call in a
decode loop costs a dictionary look-up and a launch.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import triton
from triton.backends.nvidia.driver import make_tensordesc_arg
from triton.tools.tensor_descriptor import TensorDescriptor

from bi_torch.device import FIRST_LAUNCH, architecture, bind_context, direct_launcher, multiprocessors, new_tensor
from bi_torch.direct import ALIGNMENT as _TMA_ALIGNMENT
from bi_torch.direct import keep, signature
from bi_torch.gemm import triton_kernels
from shared_specs import GemmContract, GemmSchedule, gemm_contract, gemm_schedule
from shared_specs.contract import Float32Split

_MAX_EXTENT = 2**31 - 2**16
"""Row and column numbers are 32-bit in the kernels, a tile beyond the edge included."""
_SPLIT_UNIT = 8
"""Elements of a part in 16 bytes, of which the rows of a tensor map are multiples."""
_SPLIT_BLOCK = 1024
"""Elements that one program of `split_rows` cuts."""


def gemm(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    *,
    alpha: float,
    beta: float,
    contract: GemmContract,
    schedule: GemmSchedule | None = None,
) -> None:
    """out = alpha * (a @ b) + beta * bias, on the current stream.

    Args:
        a: [M, K] or [B, M, K], any strides.
        b: [K, N] or [B, K, N], any strides.
        bias: broadcastable to out, or None.
        out: [M, N] or [B, M, N], any strides without overlap.
        alpha, beta: rounded to float32 once.
        contract: fixes the bits.
        schedule: overrides the table's.
    """
    plan_of(a, b, bias, out, alpha, contract, schedule).launch(a, b, bias, out, alpha, beta)


def plan_of(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    alpha: float,
    contract: GemmContract,
    schedule: GemmSchedule | None = None,
    *,
    finite: bool = False,
) -> "Plan":
    """The plan of all calls whose tensors have the signatures (`bi_torch.direct`) of these; arguments as for `gemm`.

    With `finite` an output that is not finite is NaN.
    """
    key = (
        signature(a), signature(b), signature(out), signature(bias), alpha == 1.0, contract.contract_id, schedule, finite,
    )  # fmt: skip
    plan = _PLANS.get(key)
    if plan is None:
        plan = keep(_PLANS, key, _plan(a, b, bias, out, alpha != 1.0, contract, schedule, finite), _MAX_PLANS)
    return plan


@dataclass
class Plan:
    """A kernel with everything but its tensors and scalars.

    Attributes:
        kernel: the Triton function.
        grid: thread blocks.
        arguments: the kernel's arguments, from a function that makes one of a tensor map and its tensor, and a call's values.
        options: compile options.
        maps: the tensor maps, in the order of the kernel's arguments.
        split_a: the launch that cuts A into its parts [parts, M, K] before, and their shape; None if A stays whole.
        run: the launch without Triton's dispatch; filled in by the first launch.
    """

    kernel: Any
    grid: tuple[int, int, int]
    arguments: Callable[..., tuple[Any, ...]]
    options: dict[str, Any]
    maps: tuple["_TensorMap", ...] = ()
    split_a: tuple["Plan", tuple[int, int, int]] | None = None
    run: Callable[..., None] | None = None

    def launch(
        self, a: torch.Tensor, b: torch.Tensor, bias: torch.Tensor | None, out: torch.Tensor, alpha: float, beta: float
    ) -> None:
        """Run on the current stream of the device of tensors with the signatures of those that it was prepared for."""
        bind_context()
        device = out.get_device()
        if device == torch._C._cuda_getDevice():
            self._launch(device, a, b, bias, out, alpha, beta)
        else:
            with torch.cuda.device(device):
                self._launch(device, a, b, bias, out, alpha, beta)

    def _launch(self, device: int, *call: Any) -> None:
        """Run on the current device, which is `device`; a profiler's hooks see a full launch."""
        if self.split_a is not None:
            split, shape = self.split_a
            a, *rest = call
            parts = new_tensor(shape, torch.bfloat16, a.device)
            split._launch(device, a, parts)
            call = (parts, *rest)
        if self.run is None or triton.knobs.runtime.launch_enter_hook.calls:
            arguments = self.arguments(_TensorMap.described, *call)
            self.kernel.warmup(*arguments, grid=self.grid, **self.options)  # compiles, on any number of threads at once
            with FIRST_LAUNCH:
                compiled = self.kernel[self.grid](*arguments, **self.options)
                if self.maps:
                    for tensor_map, layout in zip(self.maps, compiled.metadata.tensordesc_meta, strict=True):
                        tensor_map.layout = layout
                self.run = direct_launcher(compiled, self.grid)
        else:
            self.run(torch._C._cuda_getCurrentRawStream(device), self.arguments(_TensorMap.encoded, *call))


_PLANS: dict[tuple[Any, ...], Plan] = {}
_MAX_PLANS = 1 << 14


def _plan(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: bool,
    contract: GemmContract,
    schedule: GemmSchedule | None,
    finite: bool = False,
) -> Plan:
    if contract.k_leaves != 1:
        raise NotImplementedError(f"bi_torch.gemm on CUDA: k_leaves = {contract.k_leaves}; the kernels implement 1")
    if contract != gemm_contract(contract.operand):
        raise NotImplementedError(f"bi_torch.gemm on CUDA: the kernels do not implement {contract.to_json()}")
    bias = None if bias is None else _batched(bias.expand(out.shape))
    a, b, out = _batched(a), _batched(b), _batched(out)
    batch, m, k = a.shape
    n = b.shape[2]
    if max(m, n, k) > _MAX_EXTENT:
        raise ValueError(f"bi_torch.gemm on CUDA: M, N and K must not exceed {_MAX_EXTENT}, got {m}, {n}, {k}")
    if schedule is None:
        table = partial(gemm_schedule, "triton", contract.operand, m, n, k, architecture(out.device.index, "bi_torch.gemm"))
        schedule = table()
        if schedule.loads == "tma" and not _mappable(a, b, schedule):
            schedule = table("mm_strided")
    schedule.check(contract)
    if _rest(schedule.block_m) or _rest(schedule.block_k) or _rest(_rest(schedule.block_n)):
        raise ValueError(
            f"bi_torch.gemm on CUDA: block_m and block_k must be powers of two, block_n a sum of two, got {schedule}"
        )
    options = {"num_warps": schedule.warps, "num_stages": schedule.stages, "enable_fp_fusion": False}
    tiles = triton.cdiv(m, schedule.block_m) * triton.cdiv(n, schedule.block_n)
    if schedule.loads == "tma":
        if not _mappable(a, b, schedule):
            raise ValueError(
                "bi_torch.gemm on CUDA: a schedule with loads='tma' needs one batch entry and 16-byte aligned rows"
            )
        if contract.split is not None:
            return _split_tma_plan(a, b, bias, out, scale, finite, schedule, contract.split, (tiles, 1, 1), options)
        programs = min(tiles, multiprocessors(out.device.index)) if schedule.persistent else tiles
        maps, arguments = _tma_arguments(a, b, bias, out, scale, finite, schedule)
        return Plan(triton_kernels.gemm_tma, (programs, 1, 1), arguments, options, maps)
    if _rest(schedule.block_n):
        raise ValueError(f"bi_torch.gemm on CUDA: without tensor maps block_n must be a power of two, got {schedule.block_n}")
    kernel = triton_kernels.gemm_pointer if contract.split is None else triton_kernels.gemm_split
    arguments = _pointer_arguments(a, b, bias, out, scale, finite, schedule, contract)
    return Plan(kernel, (tiles * batch, 1, 1), arguments, options)


def _mappable(a: torch.Tensor, b: torch.Tensor, schedule: GemmSchedule) -> bool:
    """Whether tensor maps can describe the operands [B, M, K] and [B, K, N]; an A that is split before need not have one."""
    batch, _, k = a.shape
    return batch == 1 and k > 0 and _tma_major(b) is not None and (schedule.split_a or _tma_major(a) is not None)


def _rest(extent: int) -> int:
    """What `extent` is more than a power of two."""
    return extent - (1 << extent.bit_length() - 1) if extent else 0


def _batched(x: torch.Tensor) -> torch.Tensor:
    return x if x.dim() == 3 else x.unsqueeze(0)


def _tma_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: bool,
    finite: bool,
    schedule: GemmSchedule,
) -> tuple[tuple["_TensorMap", ...], Callable[..., tuple[Any, ...]]]:
    """The tensor maps of `gemm_tma`, and its arguments from the tensors of a call."""
    m, n, k = a.shape[1], b.shape[2], a.shape[2]
    store_tma = _tma_major(out) == 2
    block_m, block_k, rest_n = schedule.block_m, schedule.block_k, _rest(schedule.block_n)
    block_n = schedule.block_n - rest_n
    # A bias passes through shared memory as well; wider outputs take more of it.
    pieces = schedule.store_split * out.element_size() // a.element_size() * (1 if bias is None else 2)
    piece_n = max((rest_n or block_n) // pieces, _TMA_ALIGNMENT // out.element_size())
    a_map, a_is_km = _operand_map(a, block_m, block_k)
    b_map, b_is_nk = _operand_map(b, block_k, block_n)
    rest_map = _operand_map(b, block_k, rest_n)[0] if rest_n else None
    out_map = _tensor_map(out, (1, 2), (block_m, piece_n)) if store_tma else None
    constants = (
        a_is_km, b_is_nk, scale, bias is not None, finite, store_tma, block_m, block_n, rest_n, block_k,
        schedule.swap, schedule.group_m, piece_n, schedule.persistent,
    )  # fmt: skip
    tail = (m, n, k, *_epilogue_strides(out, bias), *constants)

    def arguments(
        mapped: Callable[["_TensorMap", torch.Tensor], tuple[Any, ...]],
        a: Any, b: Any, bias: Any, out: Any, alpha: float, beta: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        return (
            *mapped(a_map, a), *mapped(b_map, b), *((None,) if rest_map is None else mapped(rest_map, b)),
            *((None, out) if out_map is None else (*mapped(out_map, out), None)), bias,
            alpha, beta, *tail,
        )  # fmt: skip

    return tuple(x for x in (a_map, b_map, rest_map, out_map) if x is not None), arguments


def _split_tma_plan(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: bool,
    finite: bool,
    schedule: GemmSchedule,
    rule: Float32Split,
    grid: tuple[int, int, int],
    options: dict[str, Any],
) -> Plan:
    """`gemm_split_tma`, after `split_rows` where the schedule splits A before."""
    (_, m, k), n = a.shape, b.shape[2]
    block_m, block_n, block_k = schedule.block_m, schedule.block_n, schedule.block_k
    b_map, b_is_nk = _operand_map(b, block_k, block_n)
    split = _split_plan(a, rule) if schedule.split_a else None
    stored = a if split is None else torch.empty(split[1], dtype=torch.bfloat16, device=a.device).view(1, -1, split[1][-1])
    a_map, a_is_km = _operand_map(stored, block_m, block_k)
    tail = (
        m, n, k, *_epilogue_strides(out, bias), rule.cross, rule.promote_k, schedule.split_a, a_is_km, b_is_nk,
        scale, bias is not None, finite, block_m, block_n, block_k, schedule.swap, schedule.group_m,
    )  # fmt: skip

    def arguments(
        mapped: Callable[["_TensorMap", torch.Tensor], tuple[Any, ...]],
        a: Any, b: Any, bias: Any, out: Any, alpha: float, beta: float,
    ) -> tuple[Any, ...]:  # fmt: skip
        return *mapped(a_map, a), *mapped(b_map, b), out, bias, alpha, beta, *tail

    return Plan(triton_kernels.gemm_split_tma, grid, arguments, options, (a_map, b_map), split)


def _split_plan(a: torch.Tensor, rule: Float32Split) -> tuple[Plan, tuple[int, int, int]]:
    """`split_rows` of A [1, M, K], and the shape of the parts."""
    _, m, k = a.shape
    if rule.parts * m > _MAX_EXTENT:
        raise ValueError(
            f"bi_torch.gemm on CUDA: an A that is split before has at most {_MAX_EXTENT // rule.parts} rows, got {m}"
        )
    tail = (m, k, a.stride(1), a.stride(2), _SPLIT_UNIT, _SPLIT_BLOCK)
    grid, options = (m * triton.cdiv(k, _SPLIT_BLOCK), 1, 1), {"num_warps": _SPLIT_BLOCK // 256, "enable_fp_fusion": False}
    plan = Plan(triton_kernels.split_rows, grid, lambda _, a, parts: (a, parts, *tail), options)
    return plan, (rule.parts, m, triton.cdiv(k, _SPLIT_UNIT) * _SPLIT_UNIT)


def _epilogue_strides(out: torch.Tensor, bias: torch.Tensor | None) -> tuple[int, int, int, int]:
    """Of the rows and columns of the output and of the bias."""
    return out.stride(1), out.stride(2), *((0, 0) if bias is None else (bias.stride(1), bias.stride(2)))


class _TensorMap:
    """All of a tensor map but its address.

    Attributes:
        layout: how the compiled kernel wants the tile in shared memory; known after its first launch.
    """

    def __init__(self, descriptor: TensorDescriptor) -> None:
        self._fields = vars(descriptor).copy()
        del self._fields["base"]
        self._extents = (*descriptor.shape, *descriptor.strides)
        self._encoded: dict[int, tuple[Any, ...]] = {}
        self.layout: dict[str, Any] = {}

    def described(self, base: torch.Tensor) -> tuple[Any, ...]:
        """The argument for Triton's own launch; the fields were validated once, with the plan."""
        descriptor = TensorDescriptor.__new__(TensorDescriptor)
        descriptor.__dict__.update(self._fields, base=base)
        return (descriptor,)

    def encoded(self, base: torch.Tensor) -> tuple[Any, ...]:
        """The arguments that a compiled kernel takes, kept by address: a weight stays where it is, activations return."""
        address = base.data_ptr()
        arguments = self._encoded.get(address)
        if arguments is None:
            (descriptor,) = self.described(base)
            arguments = keep(self._encoded, address, tuple(make_tensordesc_arg(descriptor, self.layout)), _MAX_ADDRESSES)
        return arguments


_MAX_ADDRESSES = 1 << 10


def _tensor_map(x: torch.Tensor, dims: tuple[int, int], block: tuple[int, int]) -> _TensorMap:
    """The map of matrix x [1, rows, cols] as it is stored: dims[1] is contiguous, blocks are [dims[0], dims[1]]."""
    rows, contiguous = dims
    extents, strides = [x.shape[rows], x.shape[contiguous]], [_pitch(x, rows, contiguous), 1]
    return _TensorMap(TensorDescriptor(x[0], extents, strides, list(block)))


def _operand_map(x: torch.Tensor, block_rows: int, block_cols: int) -> tuple[_TensorMap, bool]:
    """The map of blocks of matrix x [1, rows, cols], and whether x is stored transposed."""
    if _tma_major(x) == 1:
        return _tensor_map(x, (2, 1), (block_cols, block_rows)), True
    return _tensor_map(x, (1, 2), (block_rows, block_cols)), False


def _pointer_arguments(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None,
    out: torch.Tensor,
    scale: bool,
    finite: bool,
    schedule: GemmSchedule,
    contract: GemmContract,
) -> Callable[..., tuple[Any, ...]]:
    """Arguments of `gemm_pointer` and `gemm_split` from the tensors of a call."""
    extents = (a.shape[1], b.shape[2], a.shape[2])
    strides = (*a.stride(), *b.stride(), *out.stride(), *(bias.stride() if bias is not None else (0, 0, 0)))
    rule = () if contract.split is None else (contract.split.cross, contract.split.promote_k)
    constants = (
        *rule,
        scale,
        bias is not None,
        finite,
        schedule.block_m,
        schedule.block_n,
        schedule.block_k,
        schedule.swap,
        schedule.group_m,
    )

    tail = (*extents, *strides, *constants)

    def arguments(_: Any, a: Any, b: Any, bias: Any, out: Any, alpha: float, beta: float) -> tuple[Any, ...]:
        return (a, b, out, bias, alpha, beta, *tail)

    return arguments


def _tma_major(x: torch.Tensor) -> int | None:
    """The contiguous dimension (1 or 2) of a matrix [1, rows, cols] that a tensor map can describe, or None."""
    unit = _TMA_ALIGNMENT // x.element_size()
    for contiguous, other in ((2, 1), (1, 2)):
        pitch = _pitch(x, other, contiguous)
        if _aligned(x) and x.stride(contiguous) == 1 and pitch % unit == 0 and pitch >= x.shape[contiguous]:
            return contiguous
    return None


def _pitch(x: torch.Tensor, other: int, contiguous: int) -> int:
    """Elements from row to row; the stride of a dimension of size 1 means nothing, so any aligned pitch will do."""
    if x.shape[other] == 1:
        unit = _TMA_ALIGNMENT // x.element_size()
        return triton.cdiv(x.shape[contiguous], unit) * unit
    return x.stride(other)


def _aligned(x: torch.Tensor) -> bool:
    return x.data_ptr() % _TMA_ALIGNMENT == 0
