"""The decoder of the examples: trained in both frameworks with the same bits, and sampled in any batches with the same bits.

On a CPU, NumPy's reference model stands for JAX's engines, so that XLA has little to compile.
"""

import functools
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bi_bridge import to_torch
from examples import cross_framework_llm
from examples.cross_framework_llm import Size
from examples.llm import jax_model, torch_model
from examples.llm.config import Config, Training
from examples.llm.text import corpus, excerpts
from tests.arrays import assert_same
from tests.model_engines import model_engines

SMALL = Config(layers=2, width=8, heads=4, kv_heads=2, head_dim=4, hidden=12)
LARGE = Config(layers=4, width=512, heads=8, kv_heads=2, head_dim=64, hidden=1408)


@pytest.fixture(scope="module")
def by_the_model():
    with model_engines():
        yield


def train_in_both(config, training, batch, length, steps):
    """After every step, the parameters of both are the same bits."""
    device = "cuda" if jax.default_backend() == "gpu" else "cpu"
    initial = config.initial()
    tensor, array = torch.from_numpy(initial).to(device), jnp.asarray(initial)
    states = {name: jnp.zeros_like(array) for name in training.state()}
    torch_states = {name: torch.zeros_like(tensor) for name in training.state()}
    train_step = jax.jit(functools.partial(jax_model.train_step, config=config, training=training))
    generator, losses = np.random.default_rng(0), []
    for step in range(1, steps + 1):
        tokens = torch.from_numpy(excerpts(corpus(), batch, length + 1, generator)).to(device)
        array, states, loss = train_step(array, states, jnp.int32(step), jnp.asarray(tokens.cpu().numpy()))
        tensor, torch_states, torch_loss = torch_model.train_step(tensor, torch_states, step, tokens, config, training)
        assert_same(to_torch(array), tensor)
        assert_same(to_torch(loss), torch_loss)
        losses.append(float(loss))
    for name, x in config.views(tensor.cpu().numpy()).items():
        assert not np.array_equal(x, config.views(initial)[name]), f"{name} was not trained"
    return losses


@pytest.mark.parametrize(
    ("training", "changes"), [(Training(), {"layers": 1}), (Training("sgd", lr=0.3), {"tied": True})], ids=("adamw", "sgd")
)
def test_training_in_both_frameworks(training, changes, by_the_model):
    losses = train_in_both(replace(SMALL, **changes), training, batch=1, length=8, steps=20)
    assert min(losses) < losses[0]


@pytest.mark.gpu
@pytest.mark.parametrize("training", [Training(lr=1e-3), Training("sgd", lr=0.1)], ids=lambda t: t.optimizer)
def test_twenty_steps_on_a_gpu(training):
    losses = train_in_both(LARGE, training, batch=8, length=256, steps=20)
    assert losses[-1] < losses[0]


def generate(config, seed, ops=None):
    prompts = torch.from_numpy(excerpts(corpus(), 4, 5, np.random.default_rng(1)))
    uniforms = torch.from_numpy(np.random.default_rng(2).random((4, 4)))
    options = {} if ops is None else {"ops": ops}
    return torch_model.generate(
        torch.from_numpy(config.initial()), config, prompts, uniforms, torch.Generator().manual_seed(seed), **options
    )


def test_samples_do_not_depend_on_batches():
    tokens, log_probabilities, sizes = generate(SMALL, 0)
    others, log_probabilities_of_others, other_sizes = generate(SMALL, 1)
    assert sizes != other_sizes
    assert torch.equal(tokens, others)
    assert_same(log_probabilities, log_probabilities_of_others)
    assert len(set(map(tuple, tokens[:, 5:].tolist()))) > 1


@pytest.fixture
def small(monkeypatch, by_the_model):
    size = Size(replace(SMALL, layers=1), Training(), batch=2, length=8, steps=2, every=1, sequences=3, prompt=4, sampled=2)
    monkeypatch.setitem(cross_framework_llm.SIZES, "tiny", size)


def test_example(small, tmp_path, capsys):
    path = tmp_path / "plot.png"
    assert cross_framework_llm.main(["--plot", str(path)]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    rows = [line for line in lines if line and line[0] in ("1", "2")]
    assert [row[3:5] for row in rows] == [["0", "0"]] * 2
    assert all(float(row[6]) > 0 for row in rows), "stock operations agree, so there is nothing to show"
    assert path.stat().st_size > 10_000


def test_example_fails_if_trainer_and_sampler_differ(small, tmp_path, monkeypatch):
    found = [cross_framework_llm.Round(step, 1.0, step * 1e-9, 0.0, [1], "") for step in range(2)]
    monkeypatch.setattr(cross_framework_llm, "rounds", lambda *_: iter(found))
    assert cross_framework_llm.main(["--plot", str(tmp_path / "plot.png")]) == 1


@pytest.mark.gpu
def test_example_on_a_gpu(tmp_path, monkeypatch):
    size = Size(LARGE, Training(lr=1e-3), batch=4, length=128, steps=20, every=10, sequences=9, prompt=16, sampled=16)
    monkeypatch.setitem(cross_framework_llm.SIZES, "100m", size)
    assert cross_framework_llm.main(["--size", "100m", "--plot", str(tmp_path / "plot.png")]) == 0
