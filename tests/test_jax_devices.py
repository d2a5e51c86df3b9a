"""Programs of `bi_jax` on eight devices, exported, and cached, as XLA compiles them for a CPU."""

import itertools
import os
import subprocess
import sys
from contextlib import nullcontext

import jax
import jax.numpy as jnp
import pytest
from jax import export
from jax.sharding import AxisType, PartitionSpec

import bi_jax
from tests.arrays import draw
from tests.model_engines import model_engines
from tests.sharding import mesh_of, sharded
from tests.test_frameworks_rows import to_jax
from tests.test_jax_transformations import assert_same


def losses(tokens, params):
    """A program of rows and products: the losses of pairs of tokens, of which the first predicts the second."""
    x = bi_jax.embedding(tokens[:, 0], params["embedding"])
    return -bi_jax.token_logprobs(bi_jax.linear(x, params["head"]), tokens[:, 1])


def step(tokens, params):
    """New parameters."""
    gradients = jax.grad(lambda params: losses(tokens, params).sum())(params)
    return bi_jax.sgd(params, gradients, lr=0.1)[0]


@pytest.fixture(scope="module")
def given():
    params = {"embedding": (11, 24), "head": (11, 24)}
    params = {name: to_jax(draw(*shape, seed=i)) for i, (name, shape) in enumerate(params.items())}
    return jnp.arange(32).reshape(16, 2) % 11, params


@pytest.fixture(scope="module")
def one_device(given):
    return jax.jit(losses)(*given)


@pytest.mark.parametrize(
    ("kind", "check_vma"), [*itertools.product((AxisType.Auto, AxisType.Explicit), (True, False))], ids=str
)
def test_a_sharded_batch_has_the_bits_of_one_device(kind, check_vma, given, one_device):
    """Both matter until a program is lowered, so XLA compiles our engine in one of the programs, the model in the others."""
    with nullcontext() if (kind, check_vma) == (AxisType.Explicit, True) else model_engines():
        assert_same(sharded(losses, *given, kind, check_vma), one_device)


def test_explicitly_sharded_operands_raise(given):
    x = jax.device_put(to_jax(draw(16, 24)), jax.NamedSharding(mesh_of(AxisType.Explicit), PartitionSpec("x")))
    for op in (lambda x: bi_jax.mm(x, x.T), bi_jax.exp, lambda x: bi_jax.softmax(x, -1)):
        with pytest.raises(NotImplementedError, match=r"bi_jax\.\w+: an operand is sharded .*@x.*; use jax.shard_map"):
            jax.jit(op).trace(x)


# ---------------------------------------------------------------------------------------------------- export and caching


def exported(function, given, *platforms):
    return export.deserialize(export.export(jax.jit(function), platforms=platforms)(*given).serialize())


def test_export(given, one_device):
    """Kernels can be exported on a machine without a GPU, with gradients, and for both platforms at once."""
    assert_same(exported(losses, given, "cpu").call(*given), one_device)
    for platforms in (("cuda",), ("cpu", "cuda")):
        loaded = exported(step, given, *platforms)
        assert loaded.platforms == platforms
        assert "mosaic_gpu" in loaded.mlir_module()


def test_export_for_a_platform_without_kernels_raises(given):
    with pytest.raises(NotImplementedError, match=r"bi_jax: no .* for .*'tpu'.*: supported are cpu and cuda \(sm_90\)"):
        export.export(jax.jit(step), platforms=["cpu", "tpu"])(*given)


CACHED = """
import sys, jax, jax.numpy as jnp, bi_jax
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("compilation_cache/cache_hits")))
jax.config.update("jax_compilation_cache_dir", sys.argv[1])
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
f = lambda x, w: bi_jax.silu(bi_jax.linear(x, w))
jax.jit(f).lower(*(jax.ShapeDtypeStruct(s, "bfloat16") for s in ((4, 24), (8, 24)))).compile()
print(sum(hits))
"""


def test_persistent_compilation_cache(tmp_path):
    """Another process finds what the first one compiled."""
    env = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", CACHED, str(tmp_path)]
    hits = [int(subprocess.run(command, env=env, check=True, capture_output=True, text=True).stdout) for _ in range(2)]
    assert hits == [0, 1]


@pytest.mark.gpu
def test_transformations_on_a_gpu(given):
    """The same program by itself, and under each transformation, through the kernels."""
    tokens, params = given
    expected, new = losses(tokens, params), step(tokens, params)
    pairs = tokens.reshape(8, 2, 2)
    each = lambda pair: losses(pair, params)  # noqa: E731
    _, last = jax.lax.while_loop(lambda s: s[0] < 8, lambda s: (s[0] + 1, each(pairs[s[0]])), (0, jnp.zeros_like(expected[:2])))
    assert_same(last, expected[-2:])
    for batches in (jax.jit(jax.vmap(each))(pairs), jax.lax.scan(lambda _, pair: (None, each(pair)), None, pairs)[1]):
        assert_same(batches.reshape(16), expected)
    total = lambda params: jax.checkpoint(losses)(tokens, params).sum()  # noqa: E731
    assert_same(bi_jax.sgd(params, jax.jit(jax.grad(total))(params), lr=0.1)[0], new)
    for kind, check_vma in itertools.product((AxisType.Auto, AxisType.Explicit), (True, False)):
        assert_same(sharded(losses, *given, kind, check_vma), expected)
    assert_same(exported(step, given, "cpu", "cuda").call(*given), new)
    copied = jax.tree.map(jnp.copy, params)
    assert_same(jax.jit(step, donate_argnums=1).lower(tokens, copied).compile()(tokens, copied), new)
    assert copied["head"].is_deleted()
