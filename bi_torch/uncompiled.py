"""Kernels that torch.compile leaves alone.

Behind a break in the graph a model runs in Python while Dynamo looks at every function that is called, those included that the
dispatcher calls for an op. An engine must not be compiled: its arithmetic is rounded as it is written.
"""

from collections.abc import Callable
from typing import Any

from torch._C._dynamo import eval_frame

_SKIP = eval_frame._FrameExecStrategy(eval_frame._FrameAction.SKIP, eval_frame._FrameAction.SKIP)


def uncompiled[F: Callable[..., Any]](kernel: F) -> F:
    """`kernel`, a Python function that is to be registered with the dispatcher; nothing that it calls is compiled either."""
    eval_frame.set_code_exec_strategy(kernel.__code__, _SKIP)
    return kernel
