"""torch.compile under the mode: what is compiled has the bits of the eager model, and is compiled anew when the mode changes.

How the replaced operations get into a graph
    The mode registers its kernels at the keys AutogradCPU and AutogradCUDA, beside CPU and CUDA. Dynamo and AOTAutograd trace
    by running a model on tensors without data, so they call those kernels: what a graph records are operations
    `bi_torch::*`, before anything is decomposed or fused, in the forward and in the backward, under grad, no_grad and
    inference_mode alike. To a compiler they are opaque: it calls them, and they choose their schedule when they run, so
    nothing is frozen at the first shape that was traced.

What Inductor does with the rest
    `bi_torch.mode.graph` leaves it data movement, integers, and the arithmetic that IEEE 754 fixes, rounded as eager rounds it.
    Every other operation is a call through the dispatcher, where it meets the mode's kernels as it does in eager.

When code is compiled anew
    The mode is a guard of every frame that Dynamo compiles once the mode was used: code for another state of it is not run, and
    is found again when that state returns. Graphs cached on disk have the state, and our sources, in their keys.

Two functions of torch are wrapped, once, when the mode is first enabled and when something is first compiled under it; a
process that never enables it has torch's own.
"""

import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch._guards import Guard, GuardsContext, GuardSource, Source

State = Any
"""What the mode is: None while it is off, and an object that compares equal and hashes by what was asked for while it is on."""

_installed = False


def install(state: Callable[[], State]) -> None:
    """Make the mode a guard, and have Inductor heed it. Only the first call does anything.

    Args:
        state: the state of the mode; called whenever compiled code is entered, so it is to be fast.
    """
    global _installed
    if _installed:
        return
    _installed = True
    initialize = GuardsContext.__init__

    @wraps(initialize)
    def with_mode(self: GuardsContext) -> None:
        initialize(self)
        self.dynamo_guards.add(_guard(state))
        if state() is not None:
            from bi_torch.mode import graph  # imports Inductor

            graph.install(state)

    GuardsContext.__init__ = with_mode  # type: ignore[method-assign]
    if "torch._dynamo.convert_frame" in sys.modules:
        torch._dynamo.reset()  # what was compiled until now has no such guard


def stepped_over[F: Callable[..., Any]](function: F) -> F:
    """`function`, which Dynamo neither traces nor looks into. As torch.compiler.disable, which would import Dynamo."""
    everything = _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP)
    set_code_exec_strategy(function.__code__, everything)
    function._torchdynamo_disable = True  # type: ignore[attr-defined]
    return function


def _guard(state: Callable[[], State]) -> Guard:
    """What holds while the mode is what it is now."""
    compiled_for = state()

    def batch_invariant_mode(builder: Any, guard: Guard) -> None:
        code = [f"batch-invariant mode == {compiled_for}"]
        guard.set_export_info("batch_invariant_mode", None, code, None)
        builder.guard_manager.root.add_lambda_guard(lambda _: state() == compiled_for, code, guard.user_stack)

    return Guard(_ModeSource(), batch_invariant_mode)


class _ModeSource(Source):
    """Where the guarded value comes from, in Dynamo's terms: neither an argument nor a variable."""

    guard_source = GuardSource.GLOBAL

    @property
    def _name_template(self) -> str:
        return ""

    def __hash__(self) -> int:
        return hash(_ModeSource)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ModeSource)
