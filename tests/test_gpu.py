"""The promise on a GPU: Triton == Pallas == the reference model == every schedule == the CPU engines, bit for bit.

Tensors are drawn by PyTorch and shared with JAX, so that both frameworks compute on one buffer and outputs are compared on
the device, as integers. Most of the time goes into compilers; cases that need new kernels therefore run on threads.
"""

import functools
import gc
import itertools
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
import torch

import bi_jax
import bi_torch
from bi_bridge import to_jax
from bi_bridge import to_torch as from_jax
from bi_jax.gemm import mosaic
from bi_torch.gemm import cuda
from shared_specs import gemm_contract, schedule_table
from shared_specs.formats import FORMATS, float_format
from shared_specs.inputs import KINDS
from tests.arrays import DTYPES, NAMES, assert_same, draw, model, to_torch, views
from tests.golden.cases import FILE, dot_cases, gemm_cases
from tests.golden.record import record_dot
from tests.threads import on_threads

pytestmark = pytest.mark.gpu

OPS = ("mm", "addmm", "bmm", "baddbmm", "matmul", "linear")
SCALARS = {"addmm": ("alpha", "beta"), "baddbmm": ("alpha", "beta")}
JITTED = {op: jax.jit(getattr(bi_jax, op), static_argnames=("out_dtype", *SCALARS.get(op, ()))) for op in OPS}
SIZES = (1, 2, 3, 5, 8, 16, 17, 31, 32, 63, 64, 65, 100, 128, 255, 256, 512, 1000, 1024, 2048, 4096)
"""Rows of A in the tests of batch invariance."""
dtypes = pytest.mark.parametrize("dtype", FORMATS)


def pallas(op, *args, out_dtype=None, **options):
    """An op of `bi_jax` on contiguous CUDA tensors, as a tensor."""
    name = None if out_dtype is None else NAMES[out_dtype]
    out = JITTED[op](*map(to_jax, args), out_dtype=name, **options)
    return from_jax(out.block_until_ready())  # the caller may drop the operands


def triton(op, *args, **options):
    return getattr(bi_torch, op)(*args, **options)


def bits_of(*shape, dtype="bfloat16", kind="normal", seed=0):
    return draw(*shape, dtype=dtype, kind=kind, seed=seed).cuda()


def normal(*shape, dtype=torch.bfloat16, seed=0):
    """Large tensors, drawn on the device."""
    generator = torch.Generator("cuda").manual_seed(seed)
    return torch.empty(shape, dtype=dtype, device="cuda").normal_(generator=generator)


@pytest.fixture(autouse=True)
def _free_memory():
    yield
    gc.collect()
    torch.cuda.empty_cache()


# The arithmetic of this GPU, and whole products, against what was recorded.


@pytest.fixture(scope="module")
def golden():
    with np.load(FILE) as data:
        return dict(data)


def test_instructions_are_those_recorded(golden):
    def check(case):
        np.testing.assert_array_equal(record_dot(case), golden[case.name])

    on_threads(check, dot_cases())


def test_golden_products_in_pytorch(golden):
    def check(case):
        a, b, bias = (to_torch(x, float_format(case.dtype)).cuda() for x in case.inputs())
        options = {"alpha": case.alpha, "beta": case.beta, "out_dtype": DTYPES[case.out_dtype]}
        expected = to_torch(golden[case.name], float_format(case.out_dtype)).cuda()
        assert_same(triton("addmm", bias, a, b, **options), expected)

    on_threads(check, gemm_cases())


def test_golden_products_in_jax(golden):
    """All kinds of value in one batch: JAX compiles every shape."""

    def key(case):
        return case.dtype, case.k, case.out_dtype, case.alpha, case.beta

    def check(group):
        (dtype, _, out_dtype, alpha, beta), cases = group
        fmt = float_format(dtype)
        a, b, bias = (to_torch(np.stack(x), fmt).cuda() for x in zip(*(case.inputs() for case in cases), strict=True))
        expected = np.stack([golden[case.name] for case in cases])
        out = pallas("baddbmm", bias, a, b, alpha=alpha, beta=beta, out_dtype=DTYPES[out_dtype])
        assert_same(out, to_torch(expected, float_format(out_dtype)).cuda())

    cases = [case for case in gemm_cases() if case.dtype != "float16" and case.k in (1, 16, 65, 72, 200, 1000, 4099)]
    on_threads(check, [(shape, list(group)) for shape, group in itertools.groupby(sorted(cases, key=key), key)])


# Every schedule.


@functools.cache
def schedule_problem(dtype):
    """Operands with ragged tiles that TMA can address, and the product by the CPU engine, checked against the model."""
    m, k, n = (261, 1000, 328) if dtype != "float32" else (261, 328, 328)
    a, weight = draw(m, k, dtype=dtype, kind="wide"), draw(n, k, dtype=dtype, kind="wide", seed=1)
    expected = bi_torch.linear(a, weight)
    assert_same(expected[-9:, -9:], model(a[-9:], weight[-9:].t()))
    return a.cuda(), weight.cuda(), expected.cuda()


def table(engine):
    rows = [row for row in schedule_table("sm_90") if row.engine == engine]
    cases = list(dict.fromkeys((row.dtypes[0], row.schedule) for row in rows))
    for dtype in {dtype for dtype, _ in cases}:
        schedule_problem(dtype)
    return cases


def test_every_triton_schedule():
    def check(case):
        dtype, schedule = case
        a, weight, expected = schedule_problem(dtype)
        out = torch.full_like(expected, float("nan"))
        cuda.gemm(a, weight.t(), None, out, alpha=1.0, beta=1.0, contract=gemm_contract(dtype), schedule=schedule)
        assert_same(out, expected)

    on_threads(check, table("triton"))


def test_every_mosaic_schedule():
    def check(case):
        dtype, schedule = case
        a, weight, expected = schedule_problem(dtype)
        run = functools.partial(mosaic.gemm, contract=gemm_contract(dtype), schedule=schedule, transpose_rhs=True)
        assert_same(from_jax(jax.jit(run)(to_jax(a[None]), to_jax(weight[None])))[0], expected)

    on_threads(check, table("mosaic"))


# Batch invariance.


def check_sizes(run, k, n, sizes, dtype="bfloat16"):
    """Each of the sizes, at the start of the batch, at its end and in between, against the whole batch."""
    total = max(SIZES)
    x, weight = normal(total, k, dtype=DTYPES[dtype]), normal(n, k, dtype=DTYPES[dtype], seed=1)
    whole = run(x, weight)

    def check(size):
        for start in {0, min(7, total - size), (total - size) // 2, total - size}:
            assert_same(run(x[start : start + size].clone(), weight), whole[start : start + size])

    on_threads(check, sizes)
    return x, weight, whole


@pytest.mark.parametrize(("k", "n"), [(4096, 3072), (3000, 3072), (1024, 1000)])
def test_rows_do_not_depend_on_the_batch_in_pytorch(k, n):
    x, weight, whole = check_sizes(bi_torch.linear, k, n, SIZES)
    assert_same(whole[-5:, -9:].cpu(), model(x[-5:].cpu(), weight[-9:].t().cpu()))
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).cuda()
    assert_same(bi_torch.linear(x[order], weight), whole[order])
    assert_same(pallas("linear", x, weight), whole)


@pytest.mark.parametrize(("k", "n", "sizes"), [(4096, 3072, SIZES), (3000, 3072, (1, 17, 100, 1000))])
def test_rows_do_not_depend_on_the_batch_in_jax(k, n, sizes):
    x, weight, whole = check_sizes(functools.partial(pallas, "linear"), k, n, sizes)
    assert_same(bi_torch.linear(x, weight), whole)


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_rows_do_not_depend_on_the_batch_in_the_other_dtypes(dtype):
    _, _, whole = check_sizes(bi_torch.linear, 1024, 768, SIZES, dtype)
    _, _, again = check_sizes(functools.partial(pallas, "linear"), 1024, 768, (1, 17, 100), dtype)
    assert_same(again, whole)


@pytest.mark.parametrize("run", [bi_torch.linear, functools.partial(pallas, "linear")], ids=["triton", "pallas"])
def test_a_hundred_repetitions(run):
    weight = normal(3072, 4096, seed=1)
    for size in SIZES:
        x = normal(size, 4096)
        expected = run(x, weight)
        for _ in range(100):
            assert_same(run(x, weight), expected)


# Both frameworks.


def test_a_billion_outputs():
    finite = ("normal", "positive", "wide", "cancel", "subnormal", "tiny", "zeros")
    cases = [("bfloat16", kind, (8192, 256, 8192), 0) for kind in finite]
    cases += [("bfloat16", kind, (8192, 256, 8192), 1) for kind in ("normal", "wide", "cancel")]
    cases += [(dtype, kind, (8192, 256, 8192), 0) for dtype in ("float16", "float32") for kind in ("normal", "wide")]
    cases += [("bfloat16", kind, (8191, 24, 8195), 0) for kind in ("special", "bits")]
    compared = {}
    for dtype, kind, (m, k, n), seed in cases:
        a = bits_of(m, k, dtype=dtype, kind=kind, seed=2 * seed)
        weight = bits_of(n, k, dtype=dtype, kind={"subnormal": "normal", "tiny": "small"}.get(kind, kind), seed=2 * seed + 1)
        ours, theirs = bi_torch.linear(a, weight), pallas("linear", a, weight)
        assert_same(ours, theirs)
        compared[dtype] = compared.get(dtype, 0) + ours.numel()
    print(f"\n{sum(compared.values()):,} outputs compared between PyTorch and JAX, 0 differing: {compared}")
    assert sum(compared.values()) >= 10**9


def random_cases(dtype):
    """(dtype, m, k, n, seed) of small products; the extents come from few classes, since Triton compiles for divisors."""
    rng = np.random.default_rng(7)
    extents = rng.integers(1, 140, 120), rng.choice([1, 24, 37, 64], 120), rng.choice([1, 40, 45, 64], 120)
    return [(dtype, *map(int, shape), seed) for seed, shape in enumerate(zip(*extents, strict=True))]


def check_random(run, case):
    """addmm on the GPU against PyTorch's CPU engine."""
    dtype, m, k, n, seed = case
    kind = KINDS[seed % len(KINDS)]
    args = [draw(*shape, dtype=dtype, kind=kind, seed=seed + i) for i, shape in enumerate([(n,), (m, k), (k, n)])]
    options = {"alpha": 0.3, "beta": -1.7}
    assert_same(run("addmm", *(x.cuda() for x in args), **options).cpu(), triton("addmm", *args, **options))


@dtypes
def test_random_shapes_have_the_bits_of_the_cpu_in_pytorch(dtype):
    on_threads(functools.partial(check_random, triton), random_cases(dtype))


@dtypes
def test_random_shapes_have_the_bits_of_the_cpu_in_jax(dtype):
    on_threads(functools.partial(check_random, pallas), random_cases(dtype)[::15])


CALLS = {
    "mm": ((70, 72), (72, 40)),
    "addmm": ((40,), (70, 72), (72, 40)),
    "bmm": ((3, 70, 72), (3, 72, 40)),
    "baddbmm": ((3, 1, 40), (3, 70, 72), (3, 72, 40)),
    "matmul": ((2, 1, 70, 72), (3, 72, 40)),
    "linear": ((2, 35, 72), (40, 72), (40,)),
}


@dtypes
def test_gradients_are_equal_in_both_frameworks_and_on_the_cpu(dtype):
    def check(op):
        args = [draw(*shape, dtype=dtype, seed=i) for i, shape in enumerate(CALLS[op])]
        out = getattr(bi_torch, op)(*args)
        cotangent = draw(*out.shape, dtype=dtype, seed=9)

        def gradients(device):
            leaves = [x.to(device).requires_grad_() for x in args]
            result = getattr(bi_torch, op)(*leaves)
            assert_same(result.detach().cpu(), out)
            return torch.autograd.grad(result, leaves, cotangent.to(device))

        def pull_back(g, *args):
            result, pullback = jax.vjp(getattr(bi_jax, op), *args)
            return result, pullback(g)

        result, grads = jax.jit(pull_back)(*(to_jax(x.cuda()) for x in (cotangent, *args)))
        assert_same(from_jax(result).cpu(), out)
        for cpu, gpu, theirs in zip(gradients("cpu"), gradients("cuda"), grads, strict=True):
            assert_same(gpu.cpu(), cpu)
            assert_same(from_jax(theirs).cpu(), cpu)

    on_threads(check, CALLS if dtype == "bfloat16" else ("mm", "linear") if dtype == "float32" else ("linear",))


# Memory layouts, epilogues, extents.


@dtypes
def test_views_of_operands(dtype):
    names = [name for name, _ in views(draw(2, 2))]

    def check(name):
        shapes = ((33, 40), (40, 24), (33, 24))
        drawn = [draw(*shape, dtype=dtype, kind="wide", seed=i) for i, shape in enumerate(shapes)]
        a, b, bias = (dict(views(x))[name] for x in drawn)
        x, y, z = (dict(views(x.cuda()))[name] for x in drawn)
        assert_same(bi_torch.mm(x, y).cpu(), model(a, b))
        assert_same(bi_torch.addmm(z, x, y).cpu(), model(a, b, bias))
        out = torch.zeros(33, 51, dtype=DTYPES[dtype], device="cuda")
        bi_torch.mm(x, y, out=out[:, 2:50:2])
        assert_same(out[:, 2:50:2].cpu(), model(a, b))
        assert not out[:, 1::2].any()
        assert not out[:, 50:].any()

    on_threads(check, names)


@pytest.mark.parametrize("run", [triton, pallas], ids=["triton", "pallas"])
def test_epilogues(run):
    """Every pair of operand, output and bias dtype, and shape of bias."""
    a, b = {}, {}
    for dtype in FORMATS:
        a[dtype], b[dtype] = draw(20, 72, dtype=dtype), draw(72, 40, dtype=dtype, seed=1)

    def check(case):
        dtype, wide_bias, wide_out, shape = case
        bias = draw(*shape, dtype="float32" if wide_bias else dtype, kind="special", seed=2)
        options = {"alpha": 0.3, "beta": -1.7, "out_dtype": torch.float32 if wide_out else DTYPES[dtype]}
        out = run("addmm", bias.cuda(), a[dtype].cuda(), b[dtype].cuda(), **options)
        assert_same(out.cpu(), model(a[dtype], b[dtype], bias, **options))

    shapes = ((40,), (20, 40), (20, 1), ())
    cases = list(itertools.product(FORMATS, (False, True), (False, True), shapes))
    if run is pallas:
        cases = [case for case in cases if case[0] == "bfloat16" and case[3] != ()]
    on_threads(check, [case for case in cases if case[0] != "float32" or not (case[1] or case[2])])


@pytest.mark.parametrize("run", [triton, pallas], ids=["triton", "pallas"])
def test_beta_zero_does_not_read_the_bias(run):
    a, b = bits_of(20, 72), bits_of(72, 40, seed=1)
    bias = torch.full((20, 40), float("nan"), dtype=a.dtype, device="cuda")
    assert_same(run("addmm", bias, a, b, beta=0.0), bi_torch.mm(a, b))


@pytest.mark.parametrize("run", [triton, pallas], ids=["triton", "pallas"])
def test_empty_extents(run):
    for m, k, n in ((0, 8, 8), (8, 0, 8), (8, 8, 0)):
        a, b, bias = draw(m, k), draw(k, n, seed=1), draw(n, seed=2)
        assert_same(run("addmm", bias.cuda(), a.cuda(), b.cuda()).cpu(), model(a, b, bias))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_long_k_and_trailing_zeros(dtype):
    a, b = bits_of(5, 40000, dtype=dtype, kind="wide"), bits_of(8, 40000, dtype=dtype, kind="wide", seed=1)
    out = bi_torch.linear(a, b)
    assert_same(out[:2, :2].cpu(), model(a[:2].cpu(), b[:2].t().cpu()))
    assert_same(pallas("linear", a, b), out)
    padded = (torch.nn.functional.pad(x, (0, 1000)) for x in (a, b))
    assert_same(bi_torch.linear(*padded), out)


def test_rows_of_zeros_leave_weight_gradients_alone():
    x, g, weight = normal(1000, 512), normal(1000, 256, seed=1), normal(256, 512, seed=2).requires_grad_()

    def gradient(x, g):
        return torch.autograd.grad(bi_torch.linear(x, weight), weight, g)[0]

    expected = gradient(x, g)
    for rows in (1, 24, 1048):
        assert_same(gradient(*(torch.nn.functional.pad(y, (0, 0, 0, rows)) for y in (x, g))), expected)


# Tensors of more than 2^31 elements.


def test_an_output_of_more_than_2_31_elements():
    m, k, n = 65536 + 8, 16, 32768 + 8
    a, weight = normal(m, k), normal(n, k, seed=1)
    out = bi_torch.linear(a, weight)
    assert out.numel() > 2**31
    for rows in (slice(0, 100), slice(m - 100, m)):
        assert_same(out[rows], bi_torch.linear(a[rows].clone(), weight))
    assert_same(out[-3:, -3:].cpu(), model(a[-3:].cpu(), weight[-3:].t().cpu()))
    assert_same(pallas("linear", a, weight), out)


def test_operands_of_more_than_2_31_elements():
    """As A, as B, and as a view that TMA cannot read."""
    big, small = normal(2**20 + 24, 2056), normal(8, 2056, seed=1)
    assert big.numel() > 2**31
    tail = big[-100:].clone()
    expected = bi_torch.linear(tail, small)
    out = bi_torch.linear(big, small)
    assert_same(out[-100:], expected)
    assert_same(pallas("linear", big, small), out)
    out = bi_torch.linear(small, big)
    assert_same(out[:, -100:], expected.t())
    assert_same(pallas("linear", small, big), out)
    view, narrow = big[:, 1:34], small[:, 1:34]
    assert_same(bi_torch.linear(view, narrow)[-100:], bi_torch.linear(tail[:, 1:34].clone(), narrow.clone()))


def test_a_float32_operand_of_more_than_2_31_elements():
    big, small = normal(2**20 + 24, 2056, dtype=torch.float32), normal(8, 2056, dtype=torch.float32, seed=1)
    assert_same(bi_torch.linear(big, small)[-50:], bi_torch.linear(big[-50:].clone(), small))


# Streams, graphs, memory, compilation.


def test_cuda_graphs():
    a, b = normal(16, 4096), normal(4096, 1024, seed=1)
    bi_torch.mm(a, b)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # JAX's threads may call CUDA meanwhile
        out = bi_torch.mm(a, b)
    for seed in (2, 3):
        a.copy_(normal(16, 4096, seed=seed))
        graph.replay()
        assert_same(out, bi_torch.mm(a, b))


def test_work_is_queued_on_the_current_stream():
    a, b, new = normal(256, 4096), normal(4096, 1024, seed=1), normal(256, 4096, seed=2)
    expected = bi_torch.mm(new, b)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(50_000_000)
        a.copy_(new)
        out = bi_torch.mm(a, b)
    stream.synchronize()
    assert_same(out, expected)


def test_a_thread_whose_first_call_is_a_product():
    """It has no current context yet, and memory from PyTorch's cache does not make one."""
    a, weights = normal(64, 4096), [normal(4096, 1024, seed=1) for _ in range(2)]
    expected = bi_torch.mm(a, weights[0])
    with ThreadPoolExecutor(1) as thread:
        assert_same(thread.submit(bi_torch.mm, a, weights[1]).result(), expected)


@pytest.mark.parametrize(("m", "k", "n"), [(1, 4096, 4096), (64, 4096, 6144), (2048, 4096, 3072)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_aligned_shapes_need_no_workspace(dtype, m, k, n):
    a, weight = normal(m, k, dtype=dtype), normal(n, k, dtype=dtype, seed=1)
    bi_torch.linear(a, weight)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = bi_torch.linear(a, weight)
    assert torch.cuda.max_memory_allocated() - before == -(-out.nbytes // 512) * 512
    shapes = [jax.ShapeDtypeStruct(x.shape, NAMES[dtype]) for x in (a, weight)]
    assert JITTED["linear"].lower(*shapes).compile().memory_analysis().temp_size_in_bytes == 0
    assert bi_jax.workspace_bytes((1, m, k), (1, n, k), NAMES[dtype], transpose_rhs=True) == 0


@pytest.mark.parametrize(
    ("m", "k", "n", "dtype"), [(5, 100, 36, "bfloat16"), (64, 4096, 1001, "bfloat16"), (8, 4100, 1001, "float32")]
)
def test_workspace_is_what_the_documentation_says(m, k, n, dtype):
    """The largest that is alive at a time may be less."""
    shapes = [jax.ShapeDtypeStruct(shape, dtype) for shape in ((m, k), (n, k))]
    used = JITTED["linear"].lower(*shapes).compile().memory_analysis().temp_size_in_bytes
    assert used <= bi_jax.workspace_bytes((1, m, k), (1, n, k), dtype, transpose_rhs=True) + 4 * 256


def test_compiled_programs():
    args = [x.requires_grad_() for x in (normal(64, 512), normal(256, 512, seed=1), normal(256, seed=2))]
    torch._dynamo.reset()
    compiled = torch.compile(bi_torch.linear, fullgraph=True, backend="aot_eager")
    assert_same(compiled(*args), bi_torch.linear(*args))
    pairs = zip(*(torch.autograd.grad(f(*args).sum(), args) for f in (compiled, bi_torch.linear)), strict=True)
    for got, want in pairs:
        assert_same(got, want)


def test_operands_on_two_devices():
    with pytest.raises(RuntimeError, match=r"bi_torch\.mm: operands must be on one CPU or CUDA device, got cuda:0 and cpu"):
        bi_torch.mm(normal(8, 8), draw(8, 8))
    with pytest.raises(RuntimeError, match=r"bi_torch\.mm: out must be .* on cuda:0, got .* on cpu"):
        bi_torch.mm(normal(8, 8), normal(8, 8), out=draw(8, 8))


def test_an_older_gpu_raises(monkeypatch):
    cuda.architecture.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    with pytest.raises(RuntimeError, match=r"bi_torch\.gemm: no kernels for sm_80 .*: supported are sm_90"):
        bi_torch.mm(normal(9, 8), normal(8, 8))
