"""The frequencies of the rotary embedding, from decimal arithmetic, so that no platform's power function takes part."""

from decimal import Context, Decimal
from functools import cache

import numpy as np

_DIGITS = Context(prec=50)


@cache
def inverse_frequencies(head_dim: int, theta: float = 10000.0) -> np.ndarray:
    """float32 [head_dim / 2]: theta ** (-2 i / head_dim), each rounded once to the nearest float32; read-only.

    Raises:
        ValueError: head_dim is not a positive even number, or theta is not a positive finite one.
    """
    if head_dim < 2 or head_dim % 2:
        raise ValueError(f"head_dim must be a positive even number, got {head_dim}")
    if not 0 < theta < float("inf"):
        raise ValueError(f"theta must be positive and finite, got {theta}")
    slope = _DIGITS.divide(_DIGITS.ln(Decimal(theta)), Decimal(-head_dim))
    exact = [_DIGITS.exp(_DIGITS.multiply(slope, Decimal(2 * i))) for i in range(head_dim // 2)]
    frequencies = np.array([_nearest(x) for x in exact], np.float32)
    frequencies.flags.writeable = False
    return frequencies


def _nearest(exact: Decimal) -> np.float32:
    """The float32 nearest to `exact`: its float64 is not far, but rounding that again may miss."""
    near = np.float32(float(exact))
    candidates = (near, *(np.nextafter(near, np.float32(end)) for end in (-np.inf, np.inf)))
    return min(candidates, key=lambda x: abs(_DIGITS.subtract(Decimal(float(x)), exact)))
