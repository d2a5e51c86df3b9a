"""Bits to tensors and back, drawn tensors and the reference model on them, for tests."""

from collections.abc import Iterator

import numpy as np
import torch

from shared_specs import gemm_contract
from shared_specs.formats import FloatFormat, float_format
from shared_specs.inputs import operand_bits
from shared_specs.reference import gemm as reference

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


def to_torch(bits: np.ndarray, fmt: FloatFormat) -> torch.Tensor:
    """A CPU tensor of the format's dtype with these bits."""
    signed = bits.view(np.int16 if fmt.bits == 16 else np.int32)
    return torch.from_numpy(signed.copy()).view(DTYPES[fmt.name])


def to_bits(x: torch.Tensor) -> np.ndarray:
    """The unsigned bits of a CPU tensor."""
    return integers(x).numpy().view(np.uint32 if x.dtype == torch.float32 else np.uint16)


def integers(x: torch.Tensor) -> torch.Tensor:
    """The bits of a tensor as integers, on its device: NaN is equal to NaN, -0 is not +0."""
    return x.detach().contiguous().view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_same(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal in shape, dtype, device and every bit."""
    assert (actual.shape, actual.dtype, actual.device) == (expected.shape, expected.dtype, expected.device)
    if not torch.equal(integers(actual), integers(expected)):
        differing = int((integers(actual) != integers(expected)).sum())
        raise AssertionError(f"{differing} of {actual.numel()} outputs differ, shape {list(actual.shape)} {actual.dtype}")


def draw(*shape: int, dtype: str = "bfloat16", kind: str = "normal", seed: int = 0) -> torch.Tensor:
    """A CPU tensor of one of the kinds of `shared_specs.inputs`."""
    fmt = float_format(dtype)
    return to_torch(operand_bits(kind, (1, *shape), fmt, seed + 10 * len(shape)), fmt)[0]


def model(
    a: torch.Tensor,
    b: torch.Tensor,
    bias: torch.Tensor | None = None,
    *,
    alpha: float = 1.0,
    beta: float = 1.0,
    out_dtype: torch.dtype | None = None,
) -> torch.Tensor:
    """alpha * (a @ b) + beta * bias by the reference model; operands are [*, M, K] and [*, K, N] on a CPU."""
    fmt, out_fmt = float_format(NAMES[a.dtype]), float_format(NAMES[out_dtype or a.dtype])
    bias_bits, bias_format = (None, None) if bias is None else (to_bits(bias), float_format(NAMES[bias.dtype]))
    options = {"bias_bits": bias_bits, "bias_format": bias_format, "alpha": alpha, "beta": beta, "out_format": out_fmt}
    return to_torch(reference(to_bits(a), to_bits(b), gemm_contract(fmt.name), **options), out_fmt)


def views(x: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Matrices of the shape of x [M, K] in every kind of memory layout, made of its elements."""
    rows, cols = x.shape
    wide = x.new_zeros(rows, 2 * cols + 3)
    wide[:, 3::2] = x
    yield "contiguous", x
    yield "transposed", x.t().contiguous().t()
    yield "strided columns", wide[:, 3::2]
    yield "offset", torch.cat([x[:1], x])[1:]
    yield "every second row", torch.stack([x, x], 1).reshape(2 * rows, cols)[::2]
    yield "row expanded", x[:1].expand(rows, cols)
    yield "column expanded", x[:, :1].expand(rows, cols)
    yield "one element", x[:1, :1].expand(rows, cols)
