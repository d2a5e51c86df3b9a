"""The parts of the model benchmark that need no GPU: the cases, the stub in attention's place, the tables."""

import pytest
import torch
from rich.console import Console

from benchmarks import model as benchmark
from bi_torch import set_batch_invariant_mode
from tests.arrays import assert_same

TINY = {
    "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
}  # fmt: skip


@pytest.fixture(scope="module")
def tiny():
    return benchmark.llama(TINY, "cpu")


@torch.no_grad()
def test_cases(tiny):
    """A step can be repeated; without attention the output is another, and attention is back afterwards."""
    cases = dict(benchmark.cases(tiny, (2, 6), (1, 3), 5))
    assert list(cases) == ["forward 2 x 6", "decode step, batch 1", "decode step, batch 3"]
    for name, step in cases.items():
        first = step()
        assert first.shape == ((2, 6, 96) if name.startswith("forward") else (int(name[-1]), 1, 96))
        assert_same(step(), first)
        with benchmark.attention(tiny, benchmark.STUB):
            assert not torch.equal(step(), first)
        assert_same(step(), first)


def test_operations_are_those_of_the_mode():
    with set_batch_invariant_mode():
        results = {op: call() for op, call in benchmark.operations("cpu").items()}
    assert all(x.isfinite().all() for x in results.values())


def test_tables():
    console = Console(record=True, width=120)
    measurements = [benchmark.Measurement("a", "all", "graph", 2.0, 2.5), benchmark.Measurement("b", "all", "eager", 2.0, 1.0)]
    console.print(
        benchmark.table(measurements, "milliseconds", "mode on"), benchmark.host_table([benchmark.HostTime("mm", 6.0, 26.5)])
    )
    text = console.export_text()
    assert "1.25" in text
    assert "0.50" in text
    assert "+20.5" in text
