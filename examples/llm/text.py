"""Text that every machine has: the sources of Python's standard library, as bytes."""

import sysconfig
from pathlib import Path

import numpy as np


def corpus(most: int = 1 << 22) -> np.ndarray:
    """The first bytes of the library's modules, in the order of their names."""
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    return np.frombuffer(b"".join(file.read_bytes() for file in files)[:most], np.uint8)


def excerpts(text: np.ndarray, count: int, length: int, generator: np.random.Generator) -> np.ndarray:
    """Pieces of `text` at random places, int32 [count, length]."""
    starts = generator.integers(0, len(text) - length, count)
    return np.stack([text[start : start + length] for start in starts]).astype(np.int32)
