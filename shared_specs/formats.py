"""Binary floating-point formats as bit patterns, on NumPy alone.

NumPy has no bfloat16, so the specs and the reference model hold every operand as unsigned integers ("bits")
beside a `FloatFormat` that says how to read them. Bits in, bits out: NaN patterns and signed zeros survive.
"""

from dataclasses import dataclass

import numpy as np

FLOAT32_NAN = np.uint32(0x7FFFFFFF)
"""The one NaN pattern that an op stores in float32. The 16-bit formats store 0x7FFF."""


@dataclass(frozen=True)
class FloatFormat:
    """An IEEE 754 style binary format of 16 or 32 bits.

    Attributes:
        name: the frameworks' name of the dtype, such as "bfloat16".
        bits: storage width.
        exponent_bits: width of the biased exponent.
        mantissa_bits: width of the fraction, without the hidden bit.
    """

    name: str
    bits: int
    exponent_bits: int
    mantissa_bits: int

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormals share it."""
        return 2 - (1 << (self.exponent_bits - 1))

    @property
    def storage(self) -> np.dtype:
        """The unsigned integer dtype that holds the bits."""
        return np.dtype(np.uint16 if self.bits == 16 else np.uint32)

    @property
    def nan(self) -> int:
        """The canonical NaN pattern: positive, every fraction bit set."""
        return (1 << (self.bits - 1)) - 1

    def decode(self, bits: np.ndarray) -> np.ndarray:
        """float32 values of `bits`; exact, since float32 contains every format here."""
        bits = np.ascontiguousarray(bits, self.storage)
        if self is FLOAT32:
            return bits.view(np.float32)
        if self is FLOAT16:
            return bits.view(np.float16).astype(np.float32)
        return (bits.astype(np.uint32) << 16).view(np.float32)

    def encode(self, values: np.ndarray) -> np.ndarray:
        """Bits of float32 `values`, rounded once to nearest even; every NaN becomes `nan`."""
        values = np.ascontiguousarray(values, np.float32)
        wide = values.view(np.uint32)
        if self is FLOAT32:
            bits = wide
        elif self is FLOAT16:
            with np.errstate(over="ignore", under="ignore", invalid="ignore"):
                bits = values.astype(np.float16).view(np.uint16)
        else:
            round_up = np.uint32(0x7FFF) + ((wide >> 16) & np.uint32(1))
            with np.errstate(over="ignore"):
                bits = ((wide + round_up) >> 16).astype(np.uint16)
        return np.where(np.isnan(values), self.storage.type(self.nan), bits)


BFLOAT16 = FloatFormat("bfloat16", 16, 8, 7)
FLOAT16 = FloatFormat("float16", 16, 5, 10)
FLOAT32 = FloatFormat("float32", 32, 8, 23)

FORMATS: dict[str, FloatFormat] = {f.name: f for f in (BFLOAT16, FLOAT16, FLOAT32)}


def float_format(name: str) -> FloatFormat:
    """The format called `name`.

    Raises:
        ValueError: `name` is not one of bfloat16, float16, float32.
    """
    try:
        return FORMATS[name]
    except KeyError:
        raise ValueError(f"unsupported dtype {name!r}: expected one of {', '.join(FORMATS)}") from None
