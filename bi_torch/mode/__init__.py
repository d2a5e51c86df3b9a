"""The mode: an unmodified PyTorch model becomes batch-invariant.

Within `set_batch_invariant_mode()` the dispatcher runs kernels of ours in place of torch's for every op that reduces, and
refuses an op that is known to depend on the batch and has no such kernel. `switch` turns it on and off, `overrides` says what
an override is, and the families (`products`, `reductions`, `normalization`, `activations`, `losses`) list them.
"""

from bi_torch.mode.policy import UncoveredOperationError, UncoveredOperationWarning, uncovered_calls
from bi_torch.mode.switch import (
    AttentionBlockSize,
    Mode,
    current_mode,
    disable_batch_invariant_mode,
    enable_batch_invariant_mode,
    get_batch_invariant_attention_block_size,
    is_batch_invariant_mode_enabled,
    set_batch_invariant_mode,
)

__all__ = [
    "AttentionBlockSize",
    "Mode",
    "UncoveredOperationError",
    "UncoveredOperationWarning",
    "current_mode",
    "disable_batch_invariant_mode",
    "enable_batch_invariant_mode",
    "get_batch_invariant_attention_block_size",
    "is_batch_invariant_mode_enabled",
    "set_batch_invariant_mode",
    "uncovered_calls",
]
