"""Losses."""

from bi_torch.mode.override import Override

OVERRIDES: tuple[Override, ...] = ()
