"""The operations that a program of the contract may use: those whose result IEEE 754 fixes.

Scalar programs (`shared_specs.scalar`) and row programs (`shared_specs.programs`) are Python functions whose first argument
`f` is an `Arithmetic`. Each engine has one: NumPy in the reference model, torch and jax.numpy on CPUs, Triton and PTX on
GPUs. A program is written once and every engine calls it, so there is no second copy of a formula to drift.
"""

from typing import Any, Protocol

Value = Any
"""A float32, int32 or predicate of an engine: an array, a tensor, a register. A Python number stands for a constant; a
float constant must be a float32."""


class Arithmetic(Protocol):
    """float32 arithmetic: rounded to nearest even once per operation, subnormals kept, nothing contracted or reassociated.

    Integers are 32 bits wide and wrap. The payload of a NaN is unspecified until an output is stored, where it becomes the
    canonical one; so a program never branches on the bits of a NaN.
    """

    # float32 -> float32
    def add(self, x: Value, y: Value) -> Value: ...
    def sub(self, x: Value, y: Value) -> Value: ...
    def mul(self, x: Value, y: Value) -> Value: ...
    def div(self, x: Value, y: Value) -> Value: ...
    def sqrt(self, x: Value) -> Value: ...
    def fma(self, x: Value, y: Value, z: Value) -> Value:
        """x * y + z, rounded once."""

    def neg(self, x: Value) -> Value:
        """The sign flipped, of a zero too."""

    def abs(self, x: Value) -> Value: ...
    def max(self, x: Value, y: Value) -> Value:
        """The larger; NaN if either is NaN; +0 is larger than -0."""

    def min(self, x: Value, y: Value) -> Value:
        """The smaller; NaN if either is NaN; -0 is smaller than +0."""

    def narrow(self, x: Value, dtype: str) -> Value:
        """x rounded to the format `dtype` ("bfloat16", "float16" or "float32"), as float32."""

    # predicates
    def less(self, x: Value, y: Value) -> Value:
        """x < y, of two floats; False where either is NaN."""

    def equal(self, x: Value, y: Value) -> Value:
        """x == y, of two floats; +0 equals -0; False where either is NaN."""

    def is_nan(self, x: Value) -> Value: ...
    def both(self, p: Value, q: Value) -> Value:
        """Logical and."""

    def either(self, p: Value, q: Value) -> Value:
        """Logical or."""

    def select(self, p: Value, x: Value, y: Value) -> Value:
        """x where p, else y; two floats or two integers."""

    # int32
    def int_add(self, i: Value, j: Value) -> Value: ...
    def int_sub(self, i: Value, j: Value) -> Value: ...
    def int_mul(self, i: Value, j: Value) -> Value: ...
    def mul_high(self, i: Value, j: Value) -> Value:
        """The upper 32 bits of the 64-bit product of i and j, both read as unsigned."""

    def int_and(self, i: Value, j: Value) -> Value: ...
    def int_or(self, i: Value, j: Value) -> Value: ...
    def int_xor(self, i: Value, j: Value) -> Value: ...
    def shift_left(self, i: Value, count: Value) -> Value:
        """i << count, 0 <= count < 32."""

    def shift_right(self, i: Value, count: Value) -> Value:
        """i >> count with copies of the sign, 0 <= count < 32."""

    def shift_right_logical(self, i: Value, count: Value) -> Value:
        """i >> count with zeros, 0 <= count < 32."""

    def int_less(self, i: Value, j: Value) -> Value:
        """i < j, signed."""

    def int_equal(self, i: Value, j: Value) -> Value: ...

    # between the two
    def bits(self, x: Value) -> Value:
        """The pattern of a float32 as int32."""

    def from_bits(self, i: Value) -> Value:
        """The float32 of a pattern."""

    def to_int(self, x: Value) -> Value:
        """A float32 with |x| < 2**31, truncated; anything else is unspecified."""

    def to_float(self, i: Value) -> Value:
        """The nearest float32, ties to even."""
