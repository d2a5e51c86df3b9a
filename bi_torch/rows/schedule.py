"""Default schedules of the Triton row kernels: a function of shapes, chosen so that enough bytes are on their way.

Bits never depend on these numbers.
"""

from dataclasses import dataclass

from shared_specs.row_schedule import RowSchedule
from shared_specs.rows import ROW_CONTRACT

VALUES = 32
"""Elements a thread holds in registers by default."""

SHORT_VALUES = 8
"""Of rows of which a block takes many."""

MOST_VALUES = 64
"""Elements a thread may hold: about half of its registers where a block has 512 threads."""

MOST_WARPS = 16

MOST_TOGETHER = 128
"""Elements of rows that a block takes several of, in a program of two reductions: with more, Triton spreads the first one's
results over whole tiles, and they do not fit the registers."""

MOST_COOPERATING = 128
"""Segments of a row whose programs may wait for each other: no more than the multiprocessors of any Hopper GPU."""

REGISTERS = 80
"""Of a thread of a program that waits for others, where Triton would give it more than it gains from: as many blocks as
possible are to be at work on a multiprocessor."""

PROGRAMS = 256
"""Thread blocks below which a GPU of 132 multiprocessors idles."""


@dataclass(frozen=True)
class Cover:
    """How tiles cover a row: segments x chunks x lanes elements, `piece` lanes at a time."""

    segments: int
    chunks: int
    lanes: int
    piece: int

    @property
    def width(self) -> int:
        return self.segments * self.chunks * self.lanes

    def full_chunks(self, n: int) -> int:
        """How many of the first chunks lie within rows of `n` elements, where the tiles cover whole rows."""
        if n == self.width:
            return self.chunks
        return self.chunks - 1 if self.segments == 1 else 0


def power_of_two(n: int) -> int:
    """The smallest one that is at least n."""
    return 1 << max(0, n - 1).bit_length()


def row_cover(n: int, schedule: RowSchedule, vector: int, segments: int | None = None) -> Cover:
    """The tiles for whole rows of `n` elements, or for `segments` segments at a time.

    A piece is as wide as the warps that share a row load at once, `vector` elements a thread: no wider, since the tree's levels
    within a warp are shuffles while those across warps go through shared memory.
    """
    lanes = ROW_CONTRACT.lanes_for(n)
    segments = segments or power_of_two(ROW_CONTRACT.segments(n))
    chunks = max(1, -(-min(n, ROW_CONTRACT.segment) // lanes))
    warps = max(1, schedule.warps // (schedule.block_rows * segments))
    return Cover(segments, chunks, lanes, min(lanes, 32 * vector * warps))


def step_segments(schedule: RowSchedule, elements: int) -> int:
    """Segments that a program of the staged kernel works on at a time."""
    values = 32 * schedule.warps * MOST_VALUES // (ROW_CONTRACT.segment * schedule.block_rows * elements)
    return power_of_two(values + 1) // 2 if values > 1 else 1


def is_resident(n: int, schedule: RowSchedule, elements: int) -> bool:
    """Whether whole rows fit into the registers of a thread block."""
    values = power_of_two(n) * power_of_two(elements) * schedule.block_rows
    alone = schedule.blocks_per_row == 1 and not schedule.cooperative
    return alone and (n <= ROW_CONTRACT.segment or values <= 32 * schedule.warps * MOST_VALUES)


def register_limit(held: int, *, outputs: bool) -> int | None:
    """Registers of a thread of `rows_shared`, `held` bytes for each element; None: as many as Triton wants.

    With outputs a thread keeps its elements while it waits: 16 registers a byte, so that more than 2 of them leave no room.
    Without, it keeps none, and Triton takes more registers than this only where it loads elements of 32 bits.
    """
    return REGISTERS if (held <= 2) == outputs else None


def row_schedule(rows: int, n: int, elements: int, vector: int, reductions: int, *, outputs: bool) -> RowSchedule:
    """The default schedule for [rows, n] with this many inputs of that shape, `vector` elements in an access.

    A thread gets `VALUES` elements, but rather more of them than accesses that are narrower than they can be; fewer of short
    rows, and more where none is needed after a reduction.
    """
    elements = power_of_two(elements)
    short = n * elements <= MOST_TOGETHER
    block_values = 4 * 32 * (SHORT_VALUES if short else VALUES)
    block_rows = max(1, block_values // (power_of_two(n) * elements)) if n <= ROW_CONTRACT.segment else 1
    while block_rows > 1 and rows < PROGRAMS * block_rows:
        block_rows //= 2
    fewest = 2 if short and not outputs else 4
    if reductions > 1 and not short:
        block_rows, fewest = 1, max(1, min(4, power_of_two(n) * elements // 256))
    values = block_rows * power_of_two(n) * elements
    if values <= 32 * MOST_WARPS * MOST_VALUES:
        lanes = block_rows * power_of_two(ROW_CONTRACT.segments(n)) * ROW_CONTRACT.lanes_for(n)
        widest = max(lanes // (32 * vector), values // (32 * MOST_VALUES))
        if not outputs and block_rows == 1 and rows >= PROGRAMS and 4 * 32 * VALUES <= n * elements <= ROW_CONTRACT.segment:
            return RowSchedule(1, values // (32 * MOST_VALUES))
        return RowSchedule(block_rows, max(fewest, min(values // (32 * VALUES), widest)))
    segments = ROW_CONTRACT.segments(n)
    if not reductions:
        return RowSchedule(1, 8, blocks_per_row=segments)
    if segments <= MOST_COOPERATING:
        return RowSchedule(1, 4, cooperative=True)
    return RowSchedule(1, 8, blocks_per_row=max(1, min(segments, PROGRAMS // max(1, rows))))


def pointwise_cover(total: int, elements: int, vector: int) -> tuple[int, int, int]:
    """(warps, elements of a block, blocks of a program) of `pointwise` on `elements` inputs of `total` elements.

    A thread loads some 8 elements before it stores any, but fewer where programs would be: then it is latency that counts.
    """
    warps, repeat = 8, max(1, 8 // (vector * elements))
    while vector > 1 and total < PROGRAMS * 32 * warps * vector * repeat:
        vector, repeat = vector // 2, 1
    return warps, 32 * warps * vector, repeat


def column_cover(rows: int, n: int, vector: int, group: int | None = None) -> tuple[int, int, int]:
    """(lanes of a group, strips, columns of a block) of `column_sums`."""
    block_n = min(power_of_two(n), 8 * vector)
    group = min(ROW_CONTRACT.lanes_for(rows), group or max(1, 4096 // block_n))
    return group, min(4, group), block_n
