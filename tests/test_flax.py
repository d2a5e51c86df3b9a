"""An unmodified Flax transformer under bi_jax.batch_invariant: a sequence's logits do not depend on the batch around it."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import bi_jax
from tests.model_engines import model_engines

BATCHES = (2, 8, 64)
VOCABULARY = 64
LENGTH = 5


class Block(nnx.Module):
    def __init__(self, width, heads, dtype, rngs):
        options = {"dtype": dtype, "rngs": rngs}
        self.attention_norm = nnx.LayerNorm(width, **options)
        self.attention = nnx.MultiHeadAttention(heads, width, decode=False, **options)
        self.mlp_norm = nnx.RMSNorm(width, **options)
        self.up = nnx.Linear(width, 2 * width, **options)
        self.down = nnx.Linear(2 * width, width, **options)

    def __call__(self, x, mask):
        x = x + self.attention(self.attention_norm(x), mask=mask)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Transformer(nnx.Module):
    def __init__(self, width, heads, layers, length, dtype):
        rngs = nnx.Rngs(0)
        self.tokens = nnx.Embed(VOCABULARY, width, dtype=dtype, rngs=rngs)
        self.positions = nnx.Embed(length, width, dtype=dtype, rngs=rngs)
        self.blocks = nnx.List([Block(width, heads, dtype, rngs) for _ in range(layers)])

    def __call__(self, tokens):
        x = self.tokens(tokens) + self.positions(jnp.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x, nnx.make_causal_mask(tokens))
        return self.tokens.attend(x).astype(jnp.float32)


def logits(model, tokens):
    return model(tokens)


def sequences(count, length):
    return np.random.default_rng(count).integers(0, VOCABULARY, (count, length), np.int32)


def bits(x):
    return np.asarray(x).view(np.int32)


def changed(function, model, length):
    """By batch size, whether the logits of three sequences, at random places of a batch, are not those of each alone."""
    ours = sequences(3, length)
    alone = [bits(function(model, sequence[None]))[0] for sequence in ours]
    result = {}
    for size in BATCHES:
        batch = sequences(size, length)
        places = np.random.default_rng(size).permutation(size)[: len(ours)]
        batch[places] = ours[: len(places)]
        together = bits(function(model, batch))
        result[size] = any(np.any(together[place] != one) for place, one in zip(places, alone, strict=False))
    return result


@pytest.fixture(scope="module")
def model():
    with model_engines():  # the random numbers take XLA less time
        return Transformer(width=32, heads=2, layers=1, length=LENGTH, dtype=jnp.float32)


def test_logits_do_not_depend_on_the_batch(model):
    function = bi_jax.batch_invariant(logits)
    with model_engines():
        assert changed(function, model, LENGTH) == dict.fromkeys(BATCHES, False)
        ours = function(model, sequences(2, LENGTH))
    np.testing.assert_allclose(ours, jax.jit(logits)(model, sequences(2, LENGTH)), rtol=1e-4, atol=1e-5)


def test_stock_logits_depend_on_it(model):
    assert any(changed(jax.jit(logits), model, LENGTH).values())


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_logits_on_a_gpu(dtype):
    model = Transformer(width=1024, heads=8, layers=2, length=64, dtype=jnp.dtype(dtype))
    assert changed(bi_jax.batch_invariant(logits), model, 64) == dict.fromkeys(BATCHES, False)
    assert any(changed(jax.jit(logits), model, 64).values())
