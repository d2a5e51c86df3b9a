"""Hard inputs for a GEMM, as bit patterns that stay the same on every machine and NumPy version.

Golden data, tests and `verify` draw from here. Only raw 64-bit words of the Philox counter generator and integer
operations are used, so an output recorded once can be checked against freshly drawn inputs for ever.
"""

import numpy as np

from shared_specs.formats import FloatFormat

KINDS = ("normal", "positive", "wide", "cancel", "subnormal", "tiny", "zeros", "special", "bits")
"""What the values look like:

normal: signs random, magnitudes log-distributed under 2, as in weights and activations;
positive: the same without signs, where a truncating accumulator drifts;
wide: exponents uniform over a range that makes alignment drop bits;
cancel: the second half of K undoes the first but for the last fraction bits;
subnormal: A has exponent fields of 0, 1 and 2, B is normal;
tiny: A as in subnormal, exponents of B down to 2^-40, so that products lie at the end of float32 and beyond;
zeros: zeros of both signs, one element in four a number;
special: normal with an infinity, a NaN or a zero in some places;
bits: every bit random, NaN payloads and infinities included.
"""


def gemm_inputs(kind: str, m: int, k: int, n: int, fmt: FloatFormat, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Bits of A [m, k] and B [k, n] of one of `KINDS`.

    Raises:
        ValueError: the kind is unknown.
    """
    if kind not in KINDS:
        raise ValueError(f"unknown kind {kind!r}: expected one of {', '.join(KINDS)}")
    a = operand_bits(kind, (m, k), fmt, 2 * seed)
    b = operand_bits({"subnormal": "normal", "tiny": "small"}.get(kind, kind), (k, n), fmt, 2 * seed + 1)
    if kind == "cancel":
        half = k // 2
        sign = fmt.storage.type(1 << (fmt.bits - 1))
        a[:, half : 2 * half] = a[:, :half] ^ sign
        b[half : 2 * half] = b[:half] ^ (b[half : 2 * half] & fmt.storage.type(1))
    return a, b


def operand_bits(kind: str, shape: tuple[int, ...], fmt: FloatFormat, seed: int) -> np.ndarray:
    """Bits of one operand; `gemm_inputs` says what the kinds are."""
    words = np.random.Philox(key=seed).random_raw(int(np.prod(shape))).reshape(shape)
    fraction = words & np.uint64((1 << fmt.mantissa_bits) - 1)
    sign = np.where(kind == "positive", np.uint64(0), words >> np.uint64(63))
    choice = (words >> np.uint64(32)) & np.uint64(0xFFFF)
    bias = -fmt.min_exponent + 1

    if kind == "bits":
        return (words >> np.uint64(20)).astype(fmt.storage)
    if kind == "wide":
        reach = 7 if fmt.exponent_bits == 5 else 14
        exponent = bias - reach + choice % np.uint64(2 * reach + 1)
    elif kind in ("subnormal", "tiny"):
        exponent = choice % np.uint64(3)
    elif kind == "small":
        exponent = bias - np.minimum(choice % np.uint64(41), np.uint64(bias))
    else:
        lowest_one = choice & (~choice + np.uint64(1))
        drop = np.where(choice == 0, np.uint64(16), np.log2(np.maximum(lowest_one, 1)).astype(np.uint64))
        exponent = bias - np.minimum(drop, np.uint64(bias - 1))
    bits = _pack(sign, exponent.astype(np.uint64), fraction, fmt)

    if kind == "zeros":
        bits = np.where(choice % np.uint64(4) == 0, bits, _pack(sign, np.uint64(0), np.uint64(0), fmt))
    if kind == "special":
        top = np.uint64((1 << fmt.exponent_bits) - 1)
        lot = (words >> np.uint64(48)) % np.uint64(499)
        bits = np.where(lot == 0, _pack(sign, top, np.uint64(0), fmt), bits)
        bits = np.where(lot == 1, _pack(sign, top, fraction | np.uint64(1), fmt), bits)
        bits = np.where((lot >= 2) & (lot < 6), _pack(sign, np.uint64(0), np.uint64(0), fmt), bits)
    return bits


def _pack(sign: np.ndarray, exponent: np.ndarray | np.uint64, fraction: np.ndarray | np.uint64, fmt: FloatFormat) -> np.ndarray:
    shift = np.uint64(fmt.mantissa_bits)
    word = (sign << np.uint64(fmt.bits - 1)) | (np.asarray(exponent) << shift) | np.asarray(fraction)
    return word.astype(fmt.storage)
