"""The CPU engines of both frameworks against the reference model: not one bit may differ."""

import contextlib
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

from bi_jax.gemm import cpu as jax_cpu
from bi_torch.gemm import cpu as torch_cpu
from shared_specs import gemm_contract
from shared_specs.formats import FORMATS, float_format
from shared_specs.inputs import KINDS, gemm_inputs, operand_bits
from shared_specs.reference import gemm as reference
from tests.arrays import DTYPES, to_bits, to_torch


def run_torch(a, b, contract, *, bias_bits=None, bias_format=None, alpha=1.0, beta=1.0, out_format=None):
    fmt = float_format(contract.operand)
    bias = None if bias_bits is None else to_torch(bias_bits, bias_format or fmt)
    out_dtype = DTYPES[(out_format or fmt).name]
    x, y = to_torch(a, fmt), to_torch(b, fmt)
    return to_bits(torch_cpu.gemm(x, y, bias, alpha=alpha, beta=beta, contract=contract, out_dtype=out_dtype))


def to_jax(bits, fmt):
    return jnp.asarray(bits.view(jnp.dtype(fmt.name)))


def run_jax(a, b, contract, *, bias_bits=None, bias_format=None, alpha=1.0, beta=1.0, out_format=None):
    fmt = float_format(contract.operand)
    out_format = out_format or fmt
    bias = None if bias_bits is None else to_jax(bias_bits, bias_format or fmt)
    x, y = to_jax(a, fmt), to_jax(b, fmt)
    out = jax_cpu.gemm(x, y, bias, alpha=alpha, beta=beta, contract=contract, out_dtype=jnp.dtype(out_format.name))
    return np.asarray(out).view(out_format.storage)


ENGINES = {"torch": run_torch, "jax": run_jax}
engines = pytest.mark.parametrize("engine", ENGINES.values(), ids=ENGINES)
dtypes = pytest.mark.parametrize("dtype", FORMATS)


def check(engine, a, b, contract, **kwargs):
    np.testing.assert_array_equal(engine(a, b, contract, **kwargs), reference(a, b, contract, **kwargs))


def every_kind(m, k, n, fmt, seed=0):
    """One matrix product of each kind of input, as a batch."""
    pairs = [gemm_inputs(kind, m, k, n, fmt, seed) for kind in KINDS]
    return tuple(np.stack(side) for side in zip(*pairs, strict=True))


def near(exponent, shape, fmt, seed):
    """Random numbers with exponents around `exponent`, beyond the format's range on either side too."""
    rng = np.random.default_rng(seed)
    with np.errstate(over="ignore", under="ignore"):
        return fmt.encode(np.ldexp(rng.standard_normal(shape), exponent + rng.integers(-6, 7, shape)).astype(np.float32))


# Every new shape, alpha or beta is a compilation for JAX, so it is given fewer of them.
KS = {"torch": (0, 1, 15, 16, 17, 31, 33, 63, 64, 65, 1000), "jax": (0, 17, 64, 1000)}


@dtypes
@pytest.mark.parametrize(("engine", "k"), [(name, k) for name, ks in KS.items() for k in ks])
def test_every_kind_of_input(engine, dtype, k):
    fmt = float_format(dtype)
    check(ENGINES[engine], *every_kind(3, k, 5, fmt, seed=k), gemm_contract(dtype), out_format=FORMATS["float32"])


@engines
@dtypes
@pytest.mark.parametrize(("batch", "m", "n"), [(2, 1, 70), (2, 70, 1), (1, 33, 17), (0, 2, 3), (2, 0, 3), (2, 3, 0)])
def test_shapes(engine, dtype, batch, m, n):
    fmt = float_format(dtype)
    a, b = operand_bits("normal", (batch, m, 40), fmt, 1), operand_bits("normal", (batch, 40, n), fmt, 2)
    check(engine, a, b, gemm_contract(dtype))


@engines
@dtypes
def test_sums_that_underflow_or_overflow(engine, dtype):
    fmt = float_format(dtype)
    least, most = fmt.min_exponent, 1 - fmt.min_exponent
    exponents = [(least, 0), (least // 2, least // 2), (-149 - least, least), (-120 - least, least), (most, 0)]
    exponents += [(most // 2, most // 2), (most, most), (least, most)]
    a = np.stack([near(x, (6, 50), fmt, i) for i, (x, _) in enumerate(exponents)])
    b = np.stack([near(y, (50, 7), fmt, i + 100) for i, (_, y) in enumerate(exponents)])
    check(engine, a, b, gemm_contract(dtype), out_format=FORMATS["float32"])


EPILOGUES = [(0.7, -1.3, "float32", "operand"), (1e-38, 1e-30, "operand", "float32"), (-1, 1, "operand", "operand")]
EPILOGUES += [(1e39, 0.0, "operand", "float32"), (3, 1e-60, "float32", "operand"), (2.0**-140, 2.0, "float32", "float32")]


@dtypes
@pytest.mark.parametrize(("engine", "epilogue"), [("torch", e) for e in EPILOGUES] + [("jax", e) for e in EPILOGUES[:2]])
def test_epilogue(engine, dtype, epilogue):
    fmt = float_format(dtype)
    alpha, beta, bias_format, out_format = epilogue
    formats = {"operand": fmt, "float32": FORMATS["float32"]}
    a, b = every_kind(4, 20, 5, fmt)
    bias = operand_bits("bits", (4, 5), formats[bias_format], 3)
    kwargs = {"alpha": alpha, "beta": beta, "bias_bits": bias, "bias_format": formats[bias_format]}
    check(ENGINES[engine], a, b, gemm_contract(dtype), **kwargs, out_format=formats[out_format])


@engines
@dtypes
def test_output_is_rounded_once_subnormals_included(engine, dtype):
    fmt = float_format(dtype)
    a, b = near(fmt.min_exponent + 2, (1, 64, 1), fmt, 1), near(0, (1, 1, 64), fmt, 2)
    check(engine, a, b, gemm_contract(dtype), alpha=2.0**-8)


@dtypes
@pytest.mark.parametrize(("engine", "leaves"), [("torch", 4), ("jax", 2)])
def test_k_leaves(engine, dtype, leaves):
    fmt = float_format(dtype)
    check(ENGINES[engine], *every_kind(2, 75, 3, fmt), gemm_contract(dtype, k_leaves=leaves))


@dtypes
def test_blocks_do_not_matter(dtype, monkeypatch):
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a, b = operand_bits("wide", (3, 21, 70), fmt, 1), operand_bits("wide", (3, 70, 41), fmt, 2)
    expected = reference(a, b, contract)
    for outputs, columns, slab in ((64, 8, 1), (900, 512, 4000), (20000, 16, 1 << 20)):
        monkeypatch.setattr(torch_cpu, "TILE_OUTPUTS", outputs)
        monkeypatch.setattr(torch_cpu, "TILE_COLUMNS", columns)
        monkeypatch.setattr(torch_cpu, "SLAB_OPERANDS", slab)
        np.testing.assert_array_equal(run_torch(a, b, contract), expected)
    monkeypatch.setattr(jax_cpu, "BLOCK_OUTPUTS", 300)
    monkeypatch.setattr(jax_cpu, "BLOCK_ROWS", 4)
    np.testing.assert_array_equal(run_jax(a, b, contract), expected)


@dtypes
def test_torch_reads_any_strides(dtype):
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a, b = to_torch(operand_bits("wide", (4, 18, 66), fmt, 1), fmt), to_torch(operand_bits("wide", (4, 66, 24), fmt, 2), fmt)

    def gemm(x, y):
        return to_bits(torch_cpu.gemm(x, y, None, alpha=1.0, beta=1.0, contract=contract, out_dtype=x.dtype))

    views = [
        (a.mT.contiguous().mT, b.mT.contiguous().mT),
        (a[:, ::2, 1:60], b[:, 1:60, ::3]),
        (a[:1].expand(4, -1, -1), b),
        (a.movedim(0, 1).contiguous().movedim(1, 0), b[..., 5:6].expand(-1, -1, 9)),
    ]
    for x, y in views:
        np.testing.assert_array_equal(gemm(x, y), gemm(x.contiguous(), y.contiguous()))


@contextlib.contextmanager
def flush_denormal():
    assert torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


@dtypes
def test_torch_paths_agree(dtype, monkeypatch):
    """Whether subnormals and infinities are provided for must not matter where there are none."""
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a, b = operand_bits("normal", (2, 20, 200), fmt, 1), operand_bits("normal", (2, 200, 30), fmt, 2)
    assert torch_cpu._ordinary(to_torch(a, fmt), to_torch(b, fmt), contract)
    lean = run_torch(a, b, contract)
    monkeypatch.setattr(torch_cpu, "_ordinary", lambda *_: False)
    np.testing.assert_array_equal(run_torch(a, b, contract), lean)


def between(exponents, shape, fmt, seed):
    """Full random significands, from 1 to 1.9 lest they round up, with exponents from the first to the last, both present."""
    rng = np.random.default_rng(seed)
    drawn = rng.integers(exponents[0], exponents[1] + 1, shape)
    drawn[0, :2] = exponents
    return fmt.encode(np.ldexp(rng.uniform(1, 1.9, shape) * rng.choice((-1, 1), shape), drawn).astype(np.float32))


# Exponents of A and of B at the limits of the torch engine's 32-bit path: the last place of the least product is float32's
# smallest normal, that of an operand is, the largest operand.
BORDERS = {
    "bfloat16": [((-56, -55), (-56, -55)), ((-119, -118), (20, 21)), ((20, 25), (25, 25))],
    "float16": [((-24, -21), (-24, -20)), ((15, 15), (15, 15))],
    "float32": [((-40, -39), (-40, -39)), ((-103, -102), (24, 25)), ((20, 25), (25, 25))],
}


@pytest.mark.parametrize("state", [contextlib.nullcontext, flush_denormal], ids=["subnormals", "flush_denormal"])
@pytest.mark.parametrize(("dtype", "left", "right"), [(dtype, *pair) for dtype, pairs in BORDERS.items() for pair in pairs])
def test_torch_borders_of_the_ordinary(dtype, left, right, state):
    """With sums that cancel, and with zeros beside the largest number: their products must not count as large."""
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a, b = between(left, (4, 30), fmt, 1), between(right, (30, 6), fmt, 2)
    a[:, 15:29], b[15:29] = a[:, :14] ^ fmt.storage.type(1 << (fmt.bits - 1)), b[:14] ^ fmt.storage.type(1)
    a[2:, 3], b[3] = 0, fmt.encode(np.float32(2.0 ** min(25, 1 - fmt.min_exponent)))
    a, b = a[None], b[None]
    expected = reference(a, b, contract, out_format=FORMATS["float32"])
    assert torch_cpu._ordinary(to_torch(a, fmt), to_torch(b, fmt), contract)
    with state():
        actual = run_torch(a, b, contract, out_format=FORMATS["float32"])
    np.testing.assert_array_equal(actual, expected)
    if dtype != "float16":  # no product of which is out of reach
        beyond = between([e + (1 if left[0] > 0 else -1) for e in left], (4, 30), fmt, 1)[None]
        assert not torch_cpu._ordinary(to_torch(beyond, fmt), to_torch(b, fmt), contract)


@dtypes
def test_torch_largest_aligned_terms(dtype):
    """16 products and an accumulator with significands next to 2 and one exponent: more than int32 holds."""
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    most = fmt.storage.type(((1 - fmt.min_exponent) << fmt.mantissa_bits) + (1 << fmt.mantissa_bits) - 1)  # 1.99...
    a, b = np.full((1, 2, 32), most), np.zeros((1, 32, 2), fmt.storage)
    a[:, 1] ^= fmt.storage.type(1 << (fmt.bits - 1))
    b[:, 0], b[:, 16:] = fmt.encode(np.ones((), np.float32)), most
    check(run_torch, a, b, contract, out_format=FORMATS["float32"])


@contextlib.contextmanager
def default_dtype():
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextlib.contextmanager
def deterministic():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextlib.contextmanager
def one_thread():
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@dtypes
@pytest.mark.parametrize(
    "state",
    [
        flush_denormal,
        default_dtype,
        deterministic,
        one_thread,
        torch.inference_mode,
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.device("meta"),
    ],
    ids=["flush_denormal", "default_dtype", "deterministic", "one_thread", "inference_mode", "autocast", "default_device"],
)
def test_torch_state_does_not_matter(dtype, state):
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a, b = every_kind(20, 40, 30, fmt)
    bias = operand_bits("subnormal", (30,), fmt, 5)
    kwargs = {"bias_bits": bias, "alpha": 2.0**-140, "beta": 0.5, "out_format": FORMATS["float32"]}
    expected = run_torch(a, b, contract, **kwargs)
    with state():
        actual = run_torch(a, b, contract, **kwargs)
    np.testing.assert_array_equal(actual, expected)


def test_torch_takes_tensors_that_require_gradients():
    a = torch.ones(1, 2, 3, requires_grad=True)
    out = torch_cpu.gemm(
        a, torch.ones(1, 3, 4), None, alpha=1.0, beta=1.0, contract=gemm_contract("float32"), out_dtype=a.dtype
    )
    assert torch.equal(out, torch.full((1, 2, 4), 3.0))
    assert not out.requires_grad


@dtypes
def test_jax_surroundings_do_not_matter(dtype):
    """The reference model's bits when fused into another program, under vmap and with 64-bit types enabled."""
    fmt, contract = float_format(dtype), gemm_contract(dtype)
    a_bits, b_bits = every_kind(4, 70, 6, fmt)
    bias_bits = operand_bits("subnormal", (6,), fmt, 5)
    magnitude, one = abs(fmt.decode(a_bits)), fmt.encode(np.ones((), np.float32))
    ordinary = np.isfinite(magnitude) & (magnitude >= 2.0**fmt.min_exponent)
    a_bits = np.where(ordinary, a_bits, one)  # the program's own product flushes
    a, b, bias = (to_jax(x, fmt) for x in (a_bits, b_bits, bias_bits))

    def gemm(x, y):
        return jax_cpu.gemm(x, y, bias, alpha=0.7, beta=3.0, contract=contract, out_dtype=jnp.dtype(dtype))

    @jax.jit
    def program(x, y):
        out = gemm(jnp.flip(x, 0) * 1, jnp.flip(y, 0))
        return jnp.flip(out, 0), jnp.sum(out * 3 + 1 - out / 7)

    expected = reference(a_bits, b_bits, contract, bias_bits=bias_bits, alpha=0.7, beta=3.0)
    results = [program(a, b)[0], jax.jit(jax.vmap(lambda x, y: gemm(x[None], y[None])[0]))(a, b)]
    if dtype == "bfloat16":
        with jax.enable_x64(True):
            results.append(gemm(a, b))
    for result in results:
        np.testing.assert_array_equal(np.asarray(result).view(fmt.storage), expected)


def test_numbers_come_from_the_contract():
    """Another tensor-core arithmetic is another contract: the engines hold no number of their own."""
    fmt = float_format("bfloat16")
    base = gemm_contract("bfloat16")
    contract = replace(base, dot=replace(base.dot, name="test", k=8, fraction_bits=13))
    a, b = every_kind(3, 70, 4, fmt)
    assert np.any(reference(a, b, contract) != reference(a, b, base))
    for engine in ENGINES.values():
        check(engine, a, b, contract)
