"""How a row program runs on a GPU: everything that may change without changing a bit."""

from dataclasses import dataclass


@dataclass(frozen=True)
class RowSchedule:
    """A legal way to run a row program.

    Attributes:
        block_rows: rows that a thread block works on at a time, a power of two.
        warps: warps of a thread block; Triton takes powers of two, Mosaic multiples of four.
        blocks_per_row: thread blocks that share the segments of a row; more than one only where rows are few and long.
        persistent: thread blocks walk over the rows instead of being one to each.
        cooperative: there is a thread block for every segment, and those of a row wait for each other inside one launch, so
            that the row is read once; otherwise blocks that share a row meet between launches. `blocks_per_row` is not used.
    """

    block_rows: int = 1
    warps: int = 4
    blocks_per_row: int = 1
    persistent: bool = False
    cooperative: bool = False

    def __post_init__(self) -> None:
        if self.block_rows < 1 or self.block_rows & (self.block_rows - 1):
            raise ValueError(f"RowSchedule.block_rows must be a power of two, got {self.block_rows}")
        for name in ("warps", "blocks_per_row"):
            if getattr(self, name) < 1:
                raise ValueError(f"RowSchedule.{name} must be positive, got {getattr(self, name)}")
