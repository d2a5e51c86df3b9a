"""What happens to a call that the mode cannot make batch-invariant: it raises, warns or passes, as the user chose.

Such a call is of an op that is known to depend on the batch and that no kernel of ours replaces, or of a replaced op on a
dtype that the contract does not have: float64, complex numbers, float8. Integers and bools are exact in any order, so torch's
own kernels serve them.
"""

import threading
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from bi_torch.rows.arguments import FLOATS

Policy = Literal["raise", "warn", "ignore"]
POLICIES: tuple[Policy, ...] = ("raise", "warn", "ignore")


class UncoveredOperationError(RuntimeError):
    """An op that depends on the batch was called under the mode."""


class UncoveredOperationWarning(UserWarning):
    """An op that depends on the batch was called under the mode with `on_uncovered="warn"`."""


_CALLS: Counter[str] = Counter()
_LOCK = threading.Lock()
_on_uncovered: Policy = "raise"


def on_uncovered() -> Policy:
    """What an uncovered call does now."""
    return _on_uncovered


def set_on_uncovered(policy: Policy) -> None:
    """What an uncovered call does from now on."""
    global _on_uncovered
    _on_uncovered = policy


def uncovered_calls() -> dict[str, int]:
    """How often each uncovered op was called with `on_uncovered="warn"`, by its name, since the mode was last turned on."""
    with _LOCK:
        return dict(_CALLS)


def reset() -> None:
    """Start counting, and warning, anew."""
    with _LOCK:
        _CALLS.clear()


def report(op: str, reason: str, policy: Policy) -> None:
    """Raise, or count and warn once an op, or do nothing.

    Raises:
        UncoveredOperationError: the policy is "raise".
    """
    if policy == "ignore":
        return
    message = (
        f"aten::{op} depends on the batch and is not covered by the batch-invariant mode: {reason}. "
        f"`python -m bi_torch.mode.coverage {op.partition('.')[0].removesuffix('_')}` says more"
    )
    if policy == "raise":
        raise UncoveredOperationError(
            f"{message}; set_batch_invariant_mode(on_uncovered='warn') or 'ignore' lets it run as it is"
        )
    with _LOCK:
        _CALLS[op] += 1
        first = _CALLS[op] == 1
    if first:
        warnings.warn(message, UncoveredOperationWarning, stacklevel=2)


def inexact(arguments: Iterable[Any]) -> Iterator[torch.dtype]:
    """The dtypes of the tensors among `arguments`, lists of them included, whose arithmetic rounds."""
    for x in arguments:
        if isinstance(x, Tensor):
            if x.dtype.is_floating_point or x.dtype.is_complex:
                yield x.dtype
        elif isinstance(x, list | tuple):
            yield from inexact(x)
        elif isinstance(x, torch.dtype) and (x.is_floating_point or x.is_complex):
            yield x


def unsupported(arguments: Iterable[Any]) -> str | None:
    """Why a replaced op cannot take `arguments`; None where they are exact and need no replacement."""
    dtypes = [dtype for dtype in inexact(arguments) if dtype not in FLOATS]
    if dtypes:
        return f"its kernels take {', '.join(map(str, FLOATS))}, not {dtypes[0]}"
    return None
