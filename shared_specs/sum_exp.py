"""The sum of exponentials of a row, in one pass: what softmax, log_softmax, logsumexp and cross_entropy rest on.

Each segment has its own maximum m_s and its own sum s_s of exp(x - m_s), in the row contract's order. The row's maximum is
m, and its sum is the segments' tree over s_s * exp(m_s - m). So a segment is read once, wherever the row's maximum lies.
Segments of -inf add 0, whatever the row's maximum. Only the maximum tells of a NaN or +inf in the row: see `total`.

A softmax takes up what the sum was made of: the element's own term exp(x - m_s), times exp(m_s - m) / s, which is one number
for the segment. So there is one exponential an element, and a row of one segment has the bits of exp(x - m) * (1 / s).
"""

from typing import NamedTuple

from shared_specs import scalar
from shared_specs.arithmetic import Arithmetic, Value

INF = float("inf")


class SumExp(NamedTuple):
    """The maximum of a row, or of a segment, and the sum of exp(x - shift(max)), unspecified where the maximum is NaN or +inf.

    A formula of an output [R, N] finds the element's `term` in its segment's sum and that segment's `weight` as well.
    """

    max: Value
    sum: Value
    term: Value = None
    weight: Value = None


def shift(f: Arithmetic, maximum: Value) -> Value:
    """What is subtracted before exp: the maximum, or 0 where that is -inf."""
    return f.select(f.equal(maximum, -INF), 0.0, maximum)


def term(f: Arithmetic, x: Value, segment_max: Value) -> Value:
    """What an element adds to its segment's sum."""
    return scalar.exp_of_term(f, f.sub(x, shift(f, segment_max)))


def near_term(f: Arithmetic, x: Value, segment_max: Value) -> Value:
    """The bits of `term` with fewer operations, where `near` holds."""
    return scalar.exp_of_near_term(f, f.sub(x, segment_max))


def near(f: Arithmetic, x: Value, segment_max: Value) -> Value:
    """Whether `near_term` may stand for `term` from x to the maximum: not if one of them is NaN or infinite."""
    return f.less(scalar.NEAR, f.sub(x, segment_max))


def rescaled(f: Arithmetic, segment: SumExp, row_max: Value) -> Value:
    """What a segment adds to its row's sum: `segment.sum` where it holds the maximum, 0 where it is -inf throughout."""
    return f.mul(segment.sum, weight(f, segment.max, row_max))


def weight(f: Arithmetic, segment_max: Value, row_max: Value) -> Value:
    """What makes a number that is relative to the segment's maximum relative to the row's: at most 1, and 1 in that segment.

    An engine may take 1 for it in any row of one segment: where the formula gives something else, as the maximum is not
    finite, the total is NaN.
    """
    return scalar.exp_nonpositive(f, f.sub(segment_max, shift(f, row_max)))


def total(f: Arithmetic, row: SumExp) -> Value:
    """The row's sum, NaN where its maximum is not finite: terms are unspecified beside NaN and +inf, -inf has no softmax."""
    return f.fma(row.max, 0.0, row.sum)


def share(f: Arithmetic, row: SumExp) -> Value:
    """The element's share of its row's sum, which is its softmax: a multiplication for an element, the rest for a segment."""
    return f.mul(row.term, f.div(row.weight, total(f, row)))
