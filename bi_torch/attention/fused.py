"""Attention in one launch, where rows are of one segment and operands of 16 bits: which kernel, which tiles, which strides."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import triton
from torch import Tensor

from bi_torch.attention import triton_fused
from bi_torch.device import new_tensor
from bi_torch.rows.cuda import Launch
from bi_torch.rows.schedule import power_of_two
from bi_torch.rows.triton_arithmetic import Formulas
from shared_specs.attention import AttentionLayout, Shape
from shared_specs.programs.attention import attention_softmax
from shared_specs.rows import ROW_CONTRACT

_INSTRUCTION = 16
"""Rows of the smallest dot instruction, and elements that one takes of a chain."""
_MOST_HEAD = 128
"""Elements of a head whose tiles fit the registers."""
_MOST_OFFSET = 2**31 - 1
_SHORT = 1024
"""Keys that one program reads in the time of a few launches."""
_PROGRAMS = 64
"""Programs that together read any number of keys faster than a few launches do."""
_FEW = 256
"""Keys of rows that are summed with so many lanes. There are no more kinds of rows: a cache that grows compiles twice."""
_PLAIN, _PREFIX = (Formulas(attention_softmax(prefix)) for prefix in (False, True))


@dataclass(frozen=True)
class FusedSchedule:
    """How the rows of an entry are cut. No bit depends on it.

    Attributes:
        stored: scores are kept in memory, or computed again each time.
        block_rows: rows of a program.
        block_keys: keys of a step; divides the lanes of `RowContract`.
        warps, stages: of Triton.
        registers: of a thread, at most.
    """

    stored: bool
    block_rows: int
    block_keys: int
    warps: int
    stages: int
    registers: int | None = None


def fused_schedule(rows: int, head: int) -> FusedSchedule:
    """The default for `rows` rows an entry and heads of `head` elements, keys' or values'.

    Few rows are bound by the latency of loads: deep pipelines, and a thread has 32 scores of a chunk of lanes. Many are bound
    by arithmetic on scores: a thread has 32 of a tile, which leaves registers to the output and to independent exponentials,
    and with narrow heads so few registers that a multiprocessor runs 16 warps, or 12 where rows are too few for large blocks.
    """
    if rows <= _INSTRUCTION:
        block_rows = power_of_two(rows)
        return FusedSchedule(True, block_rows, 128 if head <= 64 else 64, max(4, block_rows), 4)
    if head > 64:
        return FusedSchedule(False, 64, 64, 4, 2)
    if rows <= 64:
        return FusedSchedule(False, 64, 64, 4, 3, 168)
    return FusedSchedule(False, 128, 64, 8, 3, 128)


def is_faster(layout: AttentionLayout, head: int) -> bool:
    """Whether one launch takes less time than a few: where keys are many, they need more programs than that of few rows."""
    rows = layout.group_count * layout.queries
    programs = layout.entry_count * triton.cdiv(rows, fused_schedule(rows, head).block_rows)
    return layout.keys <= _SHORT or programs >= _PROGRAMS


@dataclass(frozen=True)
class Strides:
    """Operands as [outer, inner, *, *, *] where they are in memory.

    Attributes:
        inner: extent of the second of the two dimensions of entries.
        query: of outer, inner, groups, queries and the head's elements.
        key, value: of outer, inner, keys and the head's elements.
    """

    inner: int
    query: Shape
    key: Shape
    value: Shape


def strides_of(layout: AttentionLayout, query: Tensor, key: Tensor, value: Tensor) -> Strides | None:
    """None if the kernels do not take these operands, none of which is empty."""
    head = max(query.shape[-1], value.shape[-1])
    if query.dtype is torch.float32 or head > _MOST_HEAD or layout.keys > ROW_CONTRACT.segment:
        return None
    given = ((query, layout.query), (key, layout.key), (value, layout.value))
    strides = [_batch_strides(x, layout, own) for x, own in given]
    entries = _merged([(layout.batch[i], *(of[i] for of in strides)) for i in layout.entries])
    groups = _merged([(layout.batch[i], strides[0][i]) for i in layout.groups])
    within = [
        sum(stride * (n - 1) for n, stride in zip(x.shape[-2:], x.stride()[-2:], strict=True)) for x in (query, key, value)
    ]
    within[0] += sum(stride * (n - 1) for n, stride in groups)
    if len(entries) > 2 or len(groups) > 1 or max(within) > _MOST_OFFSET:
        return None
    (_, *outer), (inner, *last) = [(1, 0, 0, 0)] * (2 - len(entries)) + entries
    ((_, group),) = groups or [(1, 0)]
    return Strides(
        inner,
        (outer[0], last[0], group, *query.stride()[-2:]),
        (outer[1], last[1], *key.stride()[-2:]),
        (outer[2], last[2], *value.stride()[-2:]),
    )


def _batch_strides(x: Tensor, layout: AttentionLayout, own: Shape) -> Shape:
    """Of the batch dimensions, 0 where an operand of `own` ones is repeated."""
    strides = x.view(*own, *x.shape[-2:]).stride()
    return tuple(0 if n == 1 else stride for n, stride in zip(own, strides, strict=False))


def _merged(dims: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Dimensions (extent, *strides) without those of extent 1, neighbours that are one dimension in every operand joined."""
    result: list[tuple[int, ...]] = []
    for extent, *strides in dims:
        if extent == 1:
            continue
        if result and all(outer == extent * own for outer, own in zip(result[-1][1:], strides, strict=True)):
            extent *= result.pop()[0]
        result.append((extent, *strides))
    return result


@dataclass(frozen=True)
class Fused:
    """One launch for all operands with these strides.

    Attributes:
        shape: of the output.
        scores: shape of the kernel's own memory, if it needs any.
    """

    launch: Launch
    shape: Shape
    scores: Shape | None

    @staticmethod
    def of(
        shape: Shape,
        layout: AttentionLayout,
        strides: Strides,
        head: tuple[int, int],
        scale: float,
        causal: bool,
        masked: bool,
        ordered: bool,
        schedule: FusedSchedule | None = None,
    ) -> "Fused":
        """`head`: elements of keys and of values; `masked`: rows have lengths, `ordered`: keys an order."""
        entries, rows = layout.entry_count, layout.group_count * layout.queries
        keys = min(layout.keys, layout.queries) if causal else layout.keys
        schedule = schedule or fused_schedule(rows, max(head))
        block_e, block_d = (max(_INSTRUCTION, power_of_two(n)) for n in head)
        extents = strides.query, strides.key, strides.value, scale, strides.inner, rows, keys, layout.queries
        asked = masked, causal, ordered, *head
        blocks = max(_INSTRUCTION, schedule.block_rows), schedule.block_keys, block_e, block_d
        kernel, scores = triton_fused.attend_recomputed, None
        tail: tuple[Any, ...] = (_PLAIN, _PREFIX, *asked, ROW_CONTRACT.lanes, *blocks)
        if schedule.stored:
            pitch = triton.cdiv(keys, _INSTRUCTION) * _INSTRUCTION
            lanes = max(_FEW, schedule.block_keys) if keys <= _FEW else ROW_CONTRACT.lanes
            kernel, scores = triton_fused.attend_stored, (entries, rows, pitch)
            tail = (pitch, _PREFIX, *asked, lanes, schedule.block_rows, *blocks)
        programs = entries * triton.cdiv(rows, schedule.block_rows)
        stages = schedule.stages * (1 + ordered)  # where a key stands is loaded first
        launch = Launch(
            kernel, programs, lambda call: (*call, *extents, *tail), schedule.warps, schedule.registers, stages=stages
        )
        return Fused(launch, shape, scores)

    def __call__(
        self, query: Tensor, key: Tensor, value: Tensor, lengths: Tensor | None, order: Tensor | None, scale: float
    ) -> Tensor:
        """On the current stream of the current device, which is that of the tensors."""
        out = new_tensor(self.shape, query.dtype, query.device)
        if self.scores is None:
            self.launch(query.get_device(), (query, key, value, lengths, order, out))
        else:
            scores = new_tensor(self.scores, torch.float32, query.device)
            self.launch(query.get_device(), (query, key, value, lengths, order, out, scores))
        return out
