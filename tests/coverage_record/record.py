"""Record how ATen operations behave when the batch changes: `python -m tests.coverage_record.record --device cuda`.

Every function of torch's database runs on small inputs; the ATen calls that it makes are examined one by one, on larger inputs
and under the mode, with the operations that the mode does not cover left alone. The classes that follow replace the
device's column in `bi_torch/mode/coverage.json`.
"""

import argparse
import contextlib
import json
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from bi_torch.mode import coverage, set_batch_invariant_mode
from tests.coverage_record import pool, rules
from tests.coverage_record.batches import Evidence, examine
from tests.coverage_record.calls import DTYPES, Call, calls_of, database
from tests.coverage_record.operations import Operation, functional_of, operations

Found = dict[rules.Key, Evidence]
Task = tuple[str, int]  # device, place in the database

CALLS_A_FUNCTION = 4
CALLS_A_WORKER = 24
NO_REDUCTION = 0  # reduction="none" in ATen
SECONDS_A_FUNCTION = 20.0
SECONDS_LOST = 60.0

_examined: Counter[Any] = Counter()


def examine_function(task: Task) -> tuple[Found, dict[str, str]]:
    """Evidence from one function of the database, and the errors of calls that could not be examined; runs in a worker."""
    device, index = task
    warnings.filterwarnings("ignore")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # warnings that C++ prints by the thousand
    info = database()[index]
    found: Found = {}
    errors = {}
    end = time.monotonic() + SECONDS_A_FUNCTION
    for dtype in DTYPES:
        calls = list(calls_of(info, device, dtype))
        with set_batch_invariant_mode(on_uncovered="ignore"):
            for key, call in _wanted(calls, device, dtype, index):
                if time.monotonic() > end:
                    errors[info.name] = "took too long"
                    break
                try:
                    evidence = examine(call, dtype)
                except (RuntimeError, ValueError, TypeError, IndexError, NotImplementedError) as error:
                    if "CUDA error" in str(error):
                        raise
                    errors[key[0]] = str(error).partition("\n")[0]
                    continue
                found.setdefault(key, Evidence()).merge(evidence)
    return found, errors


def _wanted(calls: list[Call], device: str, dtype: torch.dtype, index: int) -> Iterator[tuple[rules.Key, Call]]:
    """The calls that are worth an examination: of operations that no rule decides, and only so many of each."""
    replaced = rules.replaced(device)
    for call in calls:
        overload = call.op.name().removeprefix("aten::")
        name = functional_of().get(overload)
        if name is None or name in replaced or rules.decided(name, device):
            continue
        if name in rules.LOSSES and call.arguments()["reduction"] != NO_REDUCTION:
            continue
        condition = rules.CONDITIONAL.get(name)
        key = (name, condition is not None and coverage.CONDITIONS[condition].holds(call.arguments()))
        here, everywhere = (key, dtype, index), (key, dtype)
        if _examined[here] < CALLS_A_FUNCTION and _examined[everywhere] < CALLS_A_WORKER:
            _examined[here] += 1
            _examined[everywhere] += 1
            yield key, call


def collect(device: str, workers: int, console: Console) -> Found:
    """Evidence from the whole database."""
    found: Found = {}
    names = [info.name for info in database()]
    tasks = [(device, index) for index in range(len(names))]
    results = pool.work(examine_function, tasks, workers, SECONDS_LOST)
    for (_, index), result in track(results, device, len(tasks), console=console):
        if result is None:
            console.print(f"{names[index]}: lost")
            continue
        for key, evidence in result[0].items():
            found.setdefault(key, Evidence()).merge(evidence)
        for name, error in result[1].items():
            console.print(f"{names[index]}: {name}: {error}", highlight=False, soft_wrap=True)
    return found


def column(device: str, judge: Callable[[Operation], rules.Verdict]) -> dict[str, list[str]]:
    """The device's column: class, reason and condition of every operation that it runs."""
    verdicts = {}
    for name, operation in operations().items():
        if device in operation.devices:
            verdicts[name] = [part for part in judge(operation) if part is not None]
            for form in rules.missing_forms(operation, device):
                verdicts[form] = ["uncovered", "this form is not replaced by the mode"]
    for name in rules.replaced(device):  # composed operations too, and those that torch has for the other device only
        verdicts.setdefault(functional_of().get(name, name), ["covered", rules.REPLACED])
    return verdicts


def recorded_before(table: dict[str, Any], device: str) -> Callable[[Operation], rules.Verdict]:
    """The verdicts of a table, for a mode that replaces other operations now."""

    def judge(operation: Operation) -> rules.Verdict:
        if operation.name in rules.replaced(device):
            return "covered", rules.REPLACED, None
        kind, reason, *when = table["operations"][operation.name][device]
        if reason == rules.REPLACED:
            return "uncovered", "not tested", None
        return kind, reason, when[0] if when else None

    return judge


def merge(table: dict[str, Any], device: str, recorded: str, verdicts: dict[str, list[str]]) -> dict[str, Any]:
    """The table with another column for a device."""
    columns = {
        other: {name: record[other] for name, record in table["operations"].items() if other in record}
        for other in coverage.DEVICES
    } | {device: verdicts}
    names = sorted(set().union(*columns.values()))
    split = set(names)
    merged = {}
    for name in names:
        forms = [form for form in operations()[name].forms if form not in split] if name in operations() else []
        record: dict[str, Any] = {"forms": forms} if forms else {}
        merged[name] = record | {other: columns[other][name] for other in coverage.DEVICES if name in columns[other]}
    return {"recorded": table["recorded"] | {device: recorded}, "operations": merged}


def dump(table: dict[str, Any]) -> str:
    """JSON with one line an operation."""
    lines = ",\n".join(f"{json.dumps(name)}: {json.dumps(record)}" for name, record in table["operations"].items())
    return f'{{"recorded": {json.dumps(table["recorded"])},\n"operations": {{\n{lines}\n}}}}\n'


def _describe(device: str) -> str:
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU with {torch.backends.cpu.get_cpu_capability()}"
    return f"torch {torch.__version__}, {where}"


def _summary(device: str, before: dict[str, Any], after: dict[str, Any], console: Console) -> None:
    counts = Counter(record[device][0] for record in after["operations"].values() if device in record)
    table = Table("class", "operations", title=device)
    for kind in coverage.KINDS:
        table.add_row(kind, str(counts[kind]))
    console.print(table)
    for name, record in after["operations"].items():
        old, new = before["operations"].get(name, {}).get(device), record.get(device)
        if old and new and old[0] != new[0]:
            console.print(f"{name}: {old[0]} -> {new[0]} ({new[1]})", highlight=False)


def main() -> None:
    """Record one device."""
    parser = argparse.ArgumentParser(prog="python -m tests.coverage_record.record")
    parser.add_argument("--device", choices=coverage.DEVICES, required=True)
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 1))
    parser.add_argument("--out", type=Path, default=coverage.FILE, help="the table to change; another file gets a copy")
    parser.add_argument("--replaced", action="store_true", help="record nothing: note which operations the mode replaces now")
    args = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"  # of the workers
    console = Console()
    start = time.monotonic()
    before = coverage.table()
    if args.replaced:
        judge, recorded = recorded_before(before, args.device), before["recorded"][args.device]
    else:
        found = collect(args.device, args.workers, console)
        judge, recorded = partial(rules.verdict, device=args.device, found=found), _describe(args.device)
    after = merge(before, args.device, recorded, column(args.device, judge))
    args.out.write_text(dump(after))
    _summary(args.device, before, after, console)
    console.print(f"{args.out}, after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    with contextlib.suppress(KeyboardInterrupt):
        main()
