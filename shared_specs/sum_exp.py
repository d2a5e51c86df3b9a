"""The sum of exponentials of a row, in one pass: what softmax, log_softmax, logsumexp and cross_entropy rest on.

Each segment has its own maximum m_s and its own sum s_s of exp(x - m_s), in the row contract's order. The row's maximum is
m, and its sum is the segments' tree over s_s * exp(m_s - m). So a segment is read once, wherever the row's maximum lies.
Segments of -inf add 0, whatever the row's maximum; a row with +inf has the sum NaN.
"""

from typing import NamedTuple

from shared_specs import scalar
from shared_specs.arithmetic import Arithmetic, Value

INF = float("inf")


class SumExp(NamedTuple):
    """The maximum of a row, or of a segment, and the sum of exp(x - shift(max))."""

    max: Value
    sum: Value


def shift(f: Arithmetic, maximum: Value) -> Value:
    """What is subtracted before exp: the maximum, or 0 where that is -inf."""
    return f.select(f.equal(maximum, -INF), 0.0, maximum)


def term(f: Arithmetic, x: Value, segment_max: Value) -> Value:
    """What an element adds to its segment's sum."""
    return scalar.exp_nonpositive(f, f.sub(x, shift(f, segment_max)))


def rescaled(f: Arithmetic, segment: SumExp, row_max: Value) -> Value:
    """What a segment adds to its row's sum: `segment.sum` where it holds the maximum, 0 where it is -inf throughout."""
    return f.mul(segment.sum, scalar.exp_nonpositive(f, f.sub(segment.max, shift(f, row_max))))
