"""The parts of the benchmarks that need no GPU: the shapes, the arithmetic of the report, the timing."""

import json
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from rich.console import Console

import bi_jax
from benchmarks import model_jax
from benchmarks.model_report import Measurement as ModelMeasurement
from benchmarks.model_report import table
from benchmarks.report import Measurement, measurement_table, summarise, summary_table, write_json, write_plot
from benchmarks.row_operations import ALL
from benchmarks.shapes import MODELS, ROWS
from benchmarks.timing import Program, jax_program, microseconds
from bi_bridge import to_jax, to_torch
from examples.llm import jax_model, jax_stock
from examples.llm.config import Config
from tests.arrays import assert_same
from tests.model_engines import model_engines

MEASUREMENTS = [
    Measurement("a", 1, 64, 32, {"cuBLAS": 10.0, "ours": 5.0}),
    Measurement("b", 64, 64, 32, {"cuBLAS": 10.0, "ours": 20.0}),
    Measurement("c", 65, 64, 32, {"cuBLAS": 10.0, "ours": 10.0}),
    Measurement("d", 8192, 64, 32, {"cuBLAS": 30.0, "ours": 20.0}),
]


def test_models_name_every_projection() -> None:
    for projections in MODELS.values():
        by_name = {p.name: p for p in projections}
        hidden = by_name["o"].n
        assert set(by_name) == {"qkv", "o", "gate_up", "down", "lm_head"}
        assert by_name["qkv"].k == by_name["gate_up"].k == by_name["lm_head"].k == by_name["down"].n == hidden
        assert by_name["gate_up"].n == 2 * by_name["down"].k
    assert ROWS == (1, 8, 16, 32, 64, 128, 512, 2048, 8192)


def test_summary_by_batch_size() -> None:
    small, medium, large = summarise(MEASUREMENTS, "cuBLAS")
    assert (small.group, small.shapes, small.worst, small.worst_shape) == ("M <= 64", 2, 0.5, "b M=64 N=64 K=32")
    assert small.geometric_mean == pytest.approx(1.0)
    assert (medium.group, medium.worst) == ("64 < M < 512", 1.0)
    assert (large.group, large.worst) == ("M >= 512", 1.5)


def test_reports(tmp_path) -> None:
    console = Console(record=True, width=160)
    console.print(
        measurement_table("shape", MEASUREMENTS, "cuBLAS"), summary_table(summarise(MEASUREMENTS, "cuBLAS"), "cuBLAS")
    )
    assert "2.00" in console.export_text()
    write_json(tmp_path / "out.json", {"gpu": "none"}, MEASUREMENTS, {"host_us": {}})
    data = json.loads((tmp_path / "out.json").read_text())
    assert data["measurements"][0] == {"label": "a", "m": 1, "n": 64, "k": 32, "microseconds": {"cuBLAS": 10.0, "ours": 5.0}}
    write_plot(tmp_path / "out.png", "title", MEASUREMENTS, "cuBLAS")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_time_per_call() -> None:
    sleeps = {name: Program(4, lambda s=s: time.sleep(4 * s), lambda _: None) for name, s in (("one", 0.001), ("two", 0.002))}
    measured = microseconds(sleeps, repeats=3)
    assert 1000 <= measured["one"] < measured["two"]


def test_a_jax_program_makes_every_call() -> None:
    arguments = [(jnp.ones((5, 2)), jnp.full((3, 2), float(i))) for i in range(4)]
    program = jax_program(lambda x, w: x @ w.T, arguments)
    outputs = program.enqueue()
    program.wait(outputs)
    assert program.calls == 4
    assert outputs.tolist() == [0, 2, 4, 6]


SMALL = Config(layers=2, width=32, heads=4, kv_heads=2, head_dim=8, hidden=48, tied=True, vocab=40)


def test_cases_of_the_model_in_jax() -> None:
    """Of both columns: shapes of the logits, and that the stub leaves attention out."""
    weights = jax.eval_shape(lambda: model_jax.random_weights(SMALL))
    rows = {"forward 2 x 5": (2, 5), "decode step, batch 3": (3, 1)}
    for case in model_jax.cases(SMALL, (2, 5), (3,), 4):
        arguments = jax.eval_shape(case.arguments)
        for ops in (bi_jax, jax_stock):
            programs = [
                jax.make_jaxpr(partial(case.function, ops=chosen))(weights, *arguments)
                for chosen in (ops, model_jax.without_attention(ops))
            ]
            for program in programs:
                assert [(x.shape, x.dtype.name) for x in program.out_avals] == [((*rows[case.name], 40), "float32")]
            assert len(str(programs[0])) > len(str(programs[1]))


def test_a_decode_step_is_the_last_token_of_a_forward_pass() -> None:
    rng = np.random.default_rng(0)
    shapes = jax.eval_shape(lambda: model_jax.random_weights(SMALL))
    weights = {name: rng.standard_normal(x.shape, np.float32).astype(x.dtype) for name, x in shapes.items()}
    tokens = rng.integers(0, 40, (2, 2), np.int32)
    cache = tuple(np.zeros((2, 2, 2, 0, 8), weights["head"].dtype) for _ in range(2))
    with model_engines():
        step = jax.jit(lambda tokens, cache: model_jax.decode(weights, SMALL, tokens, cache, bi_jax))
        for i in range(2):
            logits, cache = step(tokens[:, i : i + 1], cache)
        expected = jax.jit(lambda tokens: jax_model.forward(weights, SMALL, tokens))(tokens)
    np.testing.assert_array_equal(np.asarray(logits)[:, 0].view(np.int32), np.asarray(expected)[:, -1].view(np.int32))


def test_table_of_a_model() -> None:
    console = Console(record=True, width=120)
    console.print(table([ModelMeasurement("forward", "all", "jit", 2.0, 3.0)], "JAX, milliseconds", "bi_jax"))
    assert "1.50" in console.export_text()


@pytest.mark.parametrize("name", ALL)
def test_row_operations_are_the_same_in_every_column(name: str) -> None:
    operation = ALL[name]
    torch.manual_seed(1)
    arguments = operation.arguments(3, 256, torch.float32, "cpu")
    eager, ours = (jax.tree.leaves(call(*arguments)) for call in (operation.eager, operation.ours))
    in_jax = jax.tree.leaves(jax.jit(operation.in_jax)(*map(to_jax, arguments)))
    for stock, x, y in zip(eager, ours, in_jax, strict=True):
        torch.testing.assert_close(x, stock, equal_nan=True)
        assert_same(x, to_torch(y))
    assert sum(x.shape.numel() == 3 * 256 for x in ours) == operation.writes
