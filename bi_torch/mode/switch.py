"""Turning the mode on and off.

The mode belongs to the process, not to a thread: its kernels stand in torch's dispatcher, which all threads share, the
autograd engine's among them, which run the backward pass on a GPU. A region entered by one thread is therefore seen by
every other, from the moment it is entered until it is left. Regions of several threads may overlap in any way: the mode is
that of the region entered last and not yet left.

While the mode is off nothing stands in the dispatcher, and torch runs as if this module did not exist. Turning it on or
off takes some milliseconds, and must not happen while another thread is inside an op; an inner region of the same mode is
free. For a server that means: enable it once, at the start.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import NamedTuple

import torch

from bi_torch.mode import compiler, overrides, policy
from bi_torch.mode.policy import POLICIES, Policy
from shared_specs import gemm_contract

VARIABLE = "BI_TORCH_BATCH_INVARIANT"
"""Environment variable that turns the mode on for a whole process, when bi_torch is imported: "1", or "portable" for
`portable=True`, and "0" or nothing for off."""


@dataclass(frozen=True)
class Mode:
    """How the mode is on.

    Attributes:
        portable: the contract's exp, log, pow, tanh, sigmoid, erf, rsqrt, sin, cos and their like too, so that another
            framework can give the same bits.
        on_uncovered: what an op does that depends on the batch and is not covered.
    """

    portable: bool = False
    on_uncovered: Policy = "raise"

    def __post_init__(self) -> None:
        if self.on_uncovered not in POLICIES:
            raise ValueError(f"on_uncovered must be one of {', '.join(map(repr, POLICIES))}, got {self.on_uncovered!r}")


class AttentionBlockSize(NamedTuple):
    """Tile sizes of attention: queries, keys."""

    block_m: int
    block_n: int


@dataclass(eq=False)
class _Region:
    """A part of the program and the mode in it; None is off."""

    mode: Mode | None


_LOCK = threading.RLock()
_regions = [_Region(None)]
"""The process itself, and the regions entered and not left, in the order of entering."""
_installed: Mode | None = None
_fastpath = True


def current_mode() -> Mode | None:
    """How the mode is on, or None."""
    return _installed


def is_batch_invariant_mode_enabled() -> bool:
    """Whether the mode is on, for every thread."""
    return _installed is not None


@contextmanager
def set_batch_invariant_mode(enabled: bool = True, *, portable: bool = False, on_uncovered: Policy = "raise") -> Iterator[None]:
    """A region in which the mode is on, or off; a context manager and a decorator. What was before is again after it.

    Args:
        enabled: on or off.
        portable: replace exp, log, pow, tanh, sigmoid, erf, rsqrt, sin, cos and their like by the contract's, too.
        on_uncovered: what an op does that depends on the batch and is not covered: "raise" an `UncoveredOperationError`,
            "warn" once an op and count the calls (`uncovered_calls`), or "ignore".

    Raises:
        ValueError: another `on_uncovered`.
    """
    region = _Region(Mode(portable, on_uncovered) if enabled else None)
    with _LOCK:
        _regions.append(region)
        _install()
    try:
        yield
    finally:
        with _LOCK:
            _regions.remove(region)
            _install()


def enable_batch_invariant_mode(*, portable: bool = False, on_uncovered: Policy = "raise") -> None:
    """Turn the mode on until the end of the innermost region, or of the process; see `set_batch_invariant_mode`."""
    _set(Mode(portable, on_uncovered))


def disable_batch_invariant_mode() -> None:
    """Turn the mode off, until the end of the innermost region, or of the process."""
    _set(None)


def get_batch_invariant_attention_block_size() -> AttentionBlockSize:
    """The tile sizes of an attention kernel that wants the bits of this library's: any multiple of these has them."""
    k = gemm_contract("bfloat16").dot.k
    return AttentionBlockSize(k, k)


def enable_from_environment(value: str | None) -> None:
    """Do what the environment variable says.

    Raises:
        ValueError: for another value.
    """
    if value not in (None, "", "0", "1", "portable"):
        raise ValueError(f"{VARIABLE} must be 0, 1 or portable, got {value!r}")
    if value in ("1", "portable"):
        enable_batch_invariant_mode(portable=value == "portable")


def _set(mode: Mode | None) -> None:
    with _LOCK:
        _regions[-1].mode = mode
        _install()


@compiler.stepped_over
def _install() -> None:
    """Make the dispatcher what the innermost region says."""
    global _installed, _fastpath
    before, after = _installed, _regions[-1].mode
    if before == after:
        return
    if after is None:
        overrides.remove()
        torch.backends.mha.set_fastpath_enabled(_fastpath)
    else:
        policy.set_on_uncovered(after.on_uncovered)
        if before is None:
            compiler.install(current_mode)
            policy.reset()
            # torch.nn.TransformerEncoder has fused kernels of its own, beside its layers.
            _fastpath = torch.backends.mha.get_fastpath_enabled()
            torch.backends.mha.set_fastpath_enabled(False)
        if before is None or before.portable != after.portable:
            overrides.install(after.portable)
    _installed = after
