"""Torch's own kernels inside ours, while the batch-invariant mode replaces them for everybody else.

The engines are made of torch operations whose results are exact, or which are exact as they are used there: `torch.sum` of
integers in float64, a sort, a cumulative sum of counts. Under the mode (`bi_torch.mode`) those must not come back to the
engines. So every kernel of ours runs marked, on its own thread, and a replaced op on a marked thread is torch's own.
"""

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import wraps
from typing import Any

Launch = tuple[Callable[[Sequence[Any]], Any], Sequence[Any], Any]
"""A prepared call, what it was given, and what it returned."""


class _Thread(threading.local):
    inside = False
    device: str | None = None
    launches: list[Launch] | None = None


THREAD = _Thread()
"""`THREAD.inside` is True where torch's own kernels run, on this thread. `THREAD.device` is what `bi_torch.direct` found of the
arguments of the op that this thread is in, under the mode, and `THREAD.launches` is where it notes what is launched there."""


def runs_stock[**P, R](kernel: Callable[P, R]) -> Callable[P, R]:
    """`kernel`, with torch's own kernels for what it calls."""

    @wraps(kernel)
    def run(*args: P.args, **kwargs: P.kwargs) -> R:
        outside = THREAD.inside
        THREAD.inside = True
        try:
            return kernel(*args, **kwargs)
        finally:
            THREAD.inside = outside

    return run


@contextmanager
def stock_kernels() -> Iterator[None]:
    """Torch's own kernels within the block, on this thread."""
    outside = THREAD.inside
    THREAD.inside = True
    try:
        yield
    finally:
        THREAD.inside = outside
