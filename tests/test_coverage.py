"""The table of ATen operations: what it says is what happens under the mode."""

import json
import math
import os
import warnings
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from bi_torch.mode import (
    UncoveredOperationError,
    UncoveredOperationWarning,
    coverage,
    overrides,
    set_batch_invariant_mode,
    uncovered_calls,
)
from bi_torch.mode.override import overload
from bi_torch.mode.uncovered import depends_on_batch
from tests.coverage_record import pool, record, rules
from tests.coverage_record.batches import examine
from tests.coverage_record.calls import Call, calls_of, database
from tests.coverage_record.operations import operations

FUNCTIONS = (
    "add", "cumsum", "exp", "gather", "index_add", "logsumexp", "masked_fill", "mm", "nn.functional.conv2d",
    "nn.functional.elu", "nn.functional.layer_norm", "nn.functional.silu", "sigmoid", "softmax", "sort", "std", "where",
)  # fmt: skip


def calls(name: str, device: str, dtype: torch.dtype) -> Iterator[Call]:
    for info in database():
        if info.name == name and not info.variant_test_name:
            yield from calls_of(info, device, dtype, samples=6)


def check_function(name: str, device: str, dtype: torch.dtype) -> None:
    """Each ATen call of a function either has the same bits alone and in a batch, or raises and is named."""
    seen: set[tuple[str, bool]] = set()
    for call in list(calls(name, device, dtype)):
        entry = coverage.lookup(call.op, device)
        assert entry is not None, f"{call.op} is not in the table"
        args, kwargs = call.tree.unflatten(call.leaves)
        refused = entry.kind == "uncovered" and depends_on_batch(entry, call.op, args, kwargs)
        if (entry.op, refused) in seen:
            continue
        seen.add((entry.op, refused))
        with set_batch_invariant_mode():
            if refused:
                with pytest.raises(UncoveredOperationError, match=rf"aten::{entry.op} "):
                    call.run(call.tensors)
            else:
                assert not examine(call, dtype, lengths=(33,)).differs, call.op
    assert seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_alone_is_the_row_in_the_batch_or_it_raises(name: str, dtype: torch.dtype) -> None:
    check_function(name, "cpu", dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", FUNCTIONS)
def test_a_row_alone_is_the_row_in_the_batch_or_it_raises_on_a_gpu(name: str, dtype: torch.dtype) -> None:
    check_function(name, "cuda", dtype)


@pytest.mark.parametrize("device", coverage.DEVICES)
def test_the_table_and_the_mode_know_the_same_replacements(device: str) -> None:
    entries = coverage.entries(device)
    covered = {name for name, entry in entries.items() if entry.kind == "covered" and entry.reason == rules.REPLACED}
    replaced = set(overrides.kernels(device, portable=False))
    assert replaced <= covered
    # A form without a kernel for the device runs the functional form, which is replaced.
    for name in covered - replaced:
        assert entries[name].functional in replaced
        assert not torch._C._dispatch_has_kernel_for_dispatch_key(f"aten::{name}", device.upper())


@pytest.mark.parametrize("device", coverage.DEVICES)
def test_every_operation_of_the_device_is_in_the_table(device: str) -> None:
    missing = {
        name
        for operation in operations().values()
        if device in operation.devices
        for name in (operation.name, *operation.forms)
        if coverage.lookup(name, device) is None
    }
    assert not missing


def test_the_file_is_well_formed() -> None:
    names = [name for op, record in coverage.table()["operations"].items() for name in (op, *record.get("forms", ()))]
    assert len(names) == len(set(names))
    assert list(coverage.table()["operations"]) == sorted(coverage.table()["operations"])
    for device in coverage.DEVICES:
        for entry in coverage.entries(device).values():
            assert entry.kind in coverage.KINDS
            assert entry.reason
            assert entry.when is None or (entry.when in coverage.CONDITIONS and entry.kind == "uncovered")
    assert all(len(line) < 600 for line in coverage.FILE.read_text().splitlines())


X = torch.arange(12.0).reshape(3, 4)
INDEX = torch.tensor([0, 0, 2])


@pytest.mark.parametrize(
    ("function", "op"),
    [
        (lambda: torch.cumsum(X, 0), "cumsum"),
        (lambda: X.clone().cumsum_(0), "cumsum_"),
        (lambda: torch.cumsum(X, 0, out=torch.empty(3, 4)), "cumsum.out"),
        (lambda: torch.cumsum(torch.arange(3), 0, dtype=torch.float32), "cumsum"),
        (lambda: torch.nn.functional.conv1d(X[None], torch.ones(2, 3, 2)), "convolution"),
        (lambda: torch.fft.fft(X), "_fft_r2c"),
        (lambda: torch.nn.functional.batch_norm(X, None, None, training=True), "native_batch_norm"),
    ],
)
def test_uncovered_operations_raise_and_say_where_to_read(function: Any, op: str) -> None:
    with set_batch_invariant_mode(), pytest.raises(UncoveredOperationError, match=rf"aten::{op} .*coverage"):
        function()
    function()


@pytest.mark.parametrize(
    "function",
    [
        lambda: torch.cumsum(torch.arange(3), 0),
        lambda: torch.cumsum(X, 0, dtype=torch.int32),
        lambda: X.index_put((INDEX,), torch.ones(3, 4)),
        lambda: X.scatter(0, INDEX[:, None], 1.0),
        lambda: torch.add(X.bfloat16(), X.bfloat16()),
        lambda: torch.rand(3, 4) + torch.zeros_like(X),
    ],
)
def test_what_does_not_depend_on_the_batch_passes(function: Any) -> None:
    with set_batch_invariant_mode():
        function()


@pytest.mark.parametrize("name", ["index_put", "index_put_", "_index_put_impl_", "_unsafe_index_put"])
def test_a_gpu_writes_to_indices_but_does_not_add(name: str) -> None:
    entry, op, args = coverage.lookup(name, "cuda"), overload(name), (X, (INDEX,), torch.ones(3, 4))
    assert entry is not None
    assert not depends_on_batch(entry, op, args, {})
    assert not depends_on_batch(entry, op, args, {"accumulate": False})
    assert depends_on_batch(entry, op, (*args, True), {})


def check_writes(device: str) -> None:
    cache, index = torch.zeros(2, 5, 3, device=device), torch.tensor([1, 3], device=device)
    with set_batch_invariant_mode():
        cache[:, index] = torch.ones(2, 2, 3, device=device)
    assert cache.sum().item() == 12


def test_a_cache_is_written_by_indices() -> None:
    check_writes("cpu")


@pytest.mark.gpu
def test_a_cache_is_written_by_indices_on_a_gpu() -> None:
    check_writes("cuda")


def check_division_of_lists(device: str) -> None:
    """A tensor has the same bits beside dense tensors and beside others, and if it is none itself."""
    x, y = (torch.randn(9, 8, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1))
    expected = overload("_foreach_div.ScalarList")([x, y], [1.7, 3.0])
    with set_batch_invariant_mode():
        for xs in ([x, y], [x.t().contiguous().t(), y], [torch.stack([x, x], -1)[..., 0], y]):
            for one, wanted in zip(overload("_foreach_div.ScalarList")(xs, [1.7, 3.0]), expected, strict=True):
                assert torch.equal(one, wanted)
            overload("_foreach_div_.ScalarList")(xs := [z.clone() if z.is_contiguous() else z for z in xs], [1.7, 3.0])
            assert all(torch.equal(one, wanted) for one, wanted in zip(xs, expected, strict=True))


def test_lists_are_divided_alike() -> None:
    check_division_of_lists("cpu")


@pytest.mark.gpu
def test_lists_are_divided_alike_on_a_gpu() -> None:
    check_division_of_lists("cuda")


def test_a_backward_pass_meets_uncovered_operations() -> None:
    x = X.clone().requires_grad_()
    y = torch.cumsum(x, 0)
    with set_batch_invariant_mode(), pytest.raises(UncoveredOperationError, match="aten::cumsum"):
        y.sum().backward()


def test_warn_counts_and_warns_once_and_ignore_does_not() -> None:
    expected = torch.cumsum(X, 0)
    with set_batch_invariant_mode(on_uncovered="warn"), warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        results = [torch.cumsum(X, 0) for _ in range(3)]
        with set_batch_invariant_mode(on_uncovered="ignore"):
            results.append(torch.cumsum(X, 0))
        assert uncovered_calls() == {"cumsum": 3}
    assert all(torch.equal(result, expected) for result in results)
    assert [warning.category for warning in caught] == [UncoveredOperationWarning]
    assert "aten::cumsum" in str(caught[0].message)


def check_loss(name: str, device: str) -> None:
    """The mean of a loss is the mode's mean, which the table takes for granted."""
    loss = getattr(torch.nn.functional, name)
    x, y = (torch.rand(5, 7, generator=torch.Generator().manual_seed(seed)).to(device) for seed in (0, 1))
    with set_batch_invariant_mode():
        assert torch.equal(loss(x, y), loss(x, y, reduction="none").mean())
        assert torch.equal(loss(x, y, reduction="sum"), loss(x, y, reduction="none").sum())


LOSSES = sorted({name.removesuffix("_backward") for name in rules.LOSSES} | {"binary_cross_entropy_with_logits"})


@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_a_loss_is_the_modes(name: str) -> None:
    check_loss(name, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("name", LOSSES)
def test_the_mean_of_a_loss_is_the_modes_on_a_gpu(name: str) -> None:
    check_loss(name, "cuda")


class Overloads(TorchDispatchMode):
    """Collects the ATen overloads that run."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch._ops.OpOverload] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "aten":
            self.seen.add(func)
        return func(*args, **(kwargs or {}))


def check_training_step(device: str) -> None:
    """A training step of a transformer layer runs no operation that the table does not know, or that it calls uncovered."""
    layer = torch.nn.TransformerEncoderLayer(16, 2, 16, dropout=0.1, batch_first=True, activation="gelu", device=device)
    optimizer = torch.optim.AdamW(layer.parameters())  # which works on lists of tensors on a GPU
    with set_batch_invariant_mode(), Overloads() as overloads:
        layer(torch.randn(2, 3, 16, device=device)).mean().backward()
        torch.nn.utils.clip_grad_norm_(layer.parameters(), 1.0)
        optimizer.step()
    entries = {op: coverage.lookup(op, device) for op in overloads.seen}
    assert len(entries) > 20
    assert {op for op, entry in entries.items() if entry is None} == set()
    assert {op for op, entry in entries.items() if entry and entry.kind == "uncovered" and entry.when is None} == set()


def test_a_training_step_runs_nothing_that_the_table_does_not_know() -> None:
    check_training_step("cpu")


@pytest.mark.gpu
def test_a_training_step_runs_nothing_that_the_table_does_not_know_on_a_gpu() -> None:
    check_training_step("cuda")


@pytest.mark.parametrize(("name", "op"), [("sigmoid", "sigmoid"), ("mm", "mm")])
def test_the_recorder_sees_stock_operations_differ(name: str, op: str) -> None:
    found = [examine(call, torch.float32) for call in calls(name, "cpu", torch.float32) if call.op.name() == f"aten::{op}"]
    assert any(evidence.differs for evidence in found)


def test_the_recorder_tells_elements_moves_and_mixtures_apart() -> None:
    def flags(name: str) -> tuple[bool, bool]:
        call = next(
            call for call in calls(name, "cpu", torch.float32) if call.op.name() == f"aten::{name}" and call.tensors[0].dim()
        )
        found = examine(call, torch.float32)
        return found.computes, found.mixes

    assert flags("sqrt") == (True, False)
    assert flags("flip") == (False, False)
    assert flags("cumsum") == (True, True)


def test_a_worker_that_dies_loses_its_task_only() -> None:
    assert dict(pool.work(math.sqrt, [4.0, 9.0], workers=1, seconds=60)) == {4.0: 2.0, 9.0: 3.0}
    assert dict(pool.work(os._exit, [3, 4], workers=1, seconds=60)) == {3: None, 4: None}


def test_a_recorded_column_replaces_the_old_one() -> None:
    old = {
        "recorded": {"cpu": "before", "cuda": "a GPU"},
        "operations": {"mul.Tensor": {"cpu": ["exact", "x"], "cuda": ["exact", "y"]}},
    }
    new = record.merge(old, "cpu", "now", {"mul.Tensor": ["elementwise", "tested"], "cumsum": ["uncovered", "sums"]})
    assert new["recorded"] == {"cpu": "now", "cuda": "a GPU"}
    assert new["operations"]["mul.Tensor"]["cpu"] == ["elementwise", "tested"]
    assert new["operations"]["mul.Tensor"]["cuda"] == ["exact", "y"]
    assert new["operations"]["cumsum"] == {"forms": ["cumsum.out", "cumsum_"], "cpu": ["uncovered", "sums"]}
    assert json.loads(record.dump(new)) == new


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert coverage.main(["cumsum", "--device", "cpu"]) == 0
    out = capsys.readouterr().out
    assert "cumsum" in out
    assert "uncovered" in out
    assert "logcumsumexp" in out
    assert coverage.main(["cumsum", "--kind", "covered"]) == 1
