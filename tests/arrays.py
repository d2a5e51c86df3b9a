"""Bits to tensors and back, for tests."""

import numpy as np
import torch

from shared_specs.formats import FloatFormat

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}


def to_torch(bits: np.ndarray, fmt: FloatFormat) -> torch.Tensor:
    """A CPU tensor of the format's dtype with these bits."""
    signed = bits.view(np.int16 if fmt.bits == 16 else np.int32)
    return torch.from_numpy(signed.copy()).view(DTYPES[fmt.name])


def to_bits(x: torch.Tensor) -> np.ndarray:
    """The unsigned bits of a CPU tensor."""
    wide = x.dtype == torch.float32
    return x.detach().contiguous().view(torch.int32 if wide else torch.int16).numpy().view(np.uint32 if wide else np.uint16)
