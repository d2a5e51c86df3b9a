"""How every ATen operation behaves when the batch changes: `python -m bi_torch.mode.coverage [WORDS]` prints the table.

The table is data, `coverage.json`: recorded, device by device, by `tests/coverage_record`, which runs torch's own database of
sample inputs and compares rows alone, in batches, at offsets and strided, bit for bit. The mode reads it to know what to
refuse, and tests hold the mode to it. An operation belongs to one of four classes:

covered      the mode replaces it, or it is composed of operations that the mode replaces
elementwise  ATen's own kernel: every element has the same bits wherever it stands, seen by test
exact        nothing is rounded that depends on other rows: views, copies, comparisons, integers, selections, random numbers
uncovered    the bits of a row may depend on the batch; the mode refuses it (see `on_uncovered`)

Operations that ATen composes of others (CompositeImplicitAutograd) are not in the table unless the mode replaces them: their
parts are. Operations on integers are exact in every class.
"""

import argparse
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch

from bi_torch.mode.policy import inexact

FILE = Path(__file__).with_name("coverage.json")
DEVICES = ("cpu", "cuda")

Kind = Literal["covered", "elementwise", "exact", "uncovered"]
KINDS: tuple[Kind, ...] = ("covered", "elementwise", "exact", "uncovered")

Arguments = Mapping[str, Any]


@dataclass(frozen=True)
class Condition:
    """Which calls of an uncovered operation depend on the batch; the others do not."""

    meaning: str
    holds: Callable[[Arguments], bool]


def _several_targets(arguments: Arguments) -> bool:
    """Whether two values may be added to one element: a single index along the dimension meets no other."""
    index, dim = arguments["index"], arguments["dim"]
    return index.dim() > 0 and index.shape[dim if index.dim() == arguments["self"].dim() else 0] > 1


def _rounds_product(arguments: Arguments) -> bool:
    return arguments["alpha"] not in (1, -1) and arguments["self"].dtype.itemsize == 2


def _rounds(arguments: Arguments) -> bool:
    """Whether numbers do not become integers before anything is done with them."""
    return arguments["dtype"] is None or any(inexact([arguments["dtype"]]))


CONDITIONS: dict[str, Condition] = {
    "accumulate": Condition("with accumulate=True", lambda arguments: bool(arguments["accumulate"])),
    "adds": Condition(
        "if the reduction is a sum, mean or product", lambda arguments: arguments["reduce"] not in ("amax", "amin")
    ),
    "alpha": Condition("for 16-bit formats and an alpha that is neither 1 nor -1", _rounds_product),
    "collisions": Condition("unless there is one index along the dimension", _several_targets),
    "rounds": Condition("unless dtype is one of integers", _rounds),
    "training": Condition("in training", lambda arguments: bool(arguments.get("training", arguments.get("train")))),
}


@dataclass(frozen=True)
class Entry:
    """What the table says of one operation on one device.

    Attributes:
        op: Name of the overload, as "cumsum" or "add.Tensor".
        kind: Its class.
        reason: Why, in a few words.
        when: Name of the condition in CONDITIONS under which an uncovered operation depends on the batch; None for always.
        functional: Name of the entry that stands for it; `op` itself, unless that is an in-place or `out` form.
    """

    op: str
    kind: Kind
    reason: str
    when: str | None
    functional: str

    def explanation(self) -> str:
        """Reason and condition in words."""
        return f"{CONDITIONS[self.when].meaning}: {self.reason}" if self.when else self.reason


def lookup(op: str | torch._ops.OpOverload, device: str) -> Entry | None:
    """The entry of an overload, None for an operation that is composed of others.

    Args:
        op: A `torch._ops.OpOverload`, or a name such as "cumsum" or "add.Tensor", in-place and `out` forms too.
        device: "cpu" or "cuda".
    """
    return entries(device).get((op if isinstance(op, str) else op.name()).removeprefix("aten::"))


@cache
def entries(device: str) -> dict[str, Entry]:
    """All entries of a device ("cpu" or "cuda") by name of overload, in-place and `out` forms included."""
    if device not in DEVICES:
        raise ValueError(f"the table knows the devices {', '.join(DEVICES)}, not {device!r}")
    found = {}
    for op, record in table()["operations"].items():
        if device in record:
            kind, reason, *when = record[device]
            for name in (op, *record.get("forms", ())):
                found[name] = Entry(name, kind, reason, when[0] if when else None, op)
    return found


def uncovered(device: str) -> dict[str, str]:
    """Overloads that depend on the batch on a device ("cpu" or "cuda"), with the reason."""
    return {name: entry.explanation() for name, entry in entries(device).items() if entry.kind == "uncovered"}


@cache
def table() -> dict[str, Any]:
    """The file: "recorded" says with what each device was recorded, "operations" holds a record per overload."""
    content: dict[str, Any] = json.loads(FILE.read_text())
    return content


def main(arguments: list[str] | None = None) -> int:
    """Print the entries that the command line asks for; 1 if there are none."""
    parser = argparse.ArgumentParser(
        prog="python -m bi_torch.mode.coverage", description="How ATen operations behave when the batch changes."
    )
    parser.add_argument("words", nargs="*", help="parts of names; all operations if there is none")
    parser.add_argument("--device", choices=DEVICES, action="append", help="both devices if it is not given")
    parser.add_argument("--kind", choices=KINDS, action="append", help="all four if it is not given")
    args = parser.parse_args(arguments)
    return _print(args.words, tuple(args.device or DEVICES), tuple(args.kind or KINDS))


def _print(words: list[str], devices: tuple[str, ...], kinds: tuple[str, ...]) -> int:
    from rich.console import Console
    from rich.table import Table

    console = Console()
    lines = Table("operation", *devices, "why", caption_justify="left")
    for op in table()["operations"]:
        found = {device: entry for device in devices if (entry := lookup(op, device)) is not None and entry.kind in kinds}
        if not found or not (not words or any(word in op for word in words)):
            continue
        reasons = dict.fromkeys(entry.explanation() for entry in found.values())
        lines.add_row(op, *(found[device].kind if device in found else "" for device in devices), "; ".join(reasons))
    lines.caption = f"{lines.row_count} operations; in-place and out forms are like the operation itself"
    console.print(lines)
    for device in devices:
        console.print(f"{device}: {table()['recorded'][device]}", highlight=False, soft_wrap=True)
    return 0 if lines.row_count else 1


if __name__ == "__main__":
    sys.exit(main())
