"""Mosaic's GPU interpret mode with the arithmetic of the GPU.

Interpret mode runs copies, barriers and warpgroups as they are. Five things in it are not the GPU's: `wgmma` is
`np.matmul` and takes no operand in registers, a NaN converted to bfloat16 is not the GPU's NaN, XLA computes with
subnormals flushed, and there is no inline PTX. Here `wgmma` is the tensor core of the reference model, from registers too,
conversions store the canonical NaN, the interpreter's program is run by `tests.interpreters.jaxprs` in place of XLA, in a
thread that keeps subnormals, and the instructions of `bi_jax.rows` are those of `tests.interpreters.warpgroup`.
"""

import contextlib
import functools
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax._src import callback
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call, jaxpr_interpret, shared_memory
from jax._src.state.types import ReshapeTransform
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.extend.core import ClosedJaxpr

from bi_jax import exact
from bi_jax.rows.warpgroup import Instruction
from shared_specs import HOPPER_DOT, float_format
from shared_specs.formats import FLOAT32
from shared_specs.reference import tensor_core
from tests.interpreters import jaxprs, warpgroup

LONGEST_WAIT = 60
"""Seconds that a warpgroup may wait for another."""

_WORKER = ThreadPoolExecutor(1)
_WORKER.submit(int).result()  # the thread inherits the floating-point mode of the one that starts it


class _Product:
    """a @ b, not yet computed: it needs the accumulator that it is added to."""

    __array_ufunc__ = None

    def __init__(self, a: np.ndarray, b: np.ndarray, dtype: np.dtype) -> None:
        assert dtype == np.float32, dtype
        self.format = float_format(a.dtype.name)
        self.a, self.b = (self.format.decode(np.ascontiguousarray(x).view(self.format.storage)) for x in (a, b))

    def __radd__(self, acc: np.ndarray) -> np.ndarray:
        return tensor_core.chain(self.a, self.b, acc, self.format, HOPPER_DOT)


def _evaluate(ufunc: np.ufunc, x: np.ndarray, y: np.ndarray) -> np.ndarray:
    return FLOAT32.decode(FLOAT32.encode(ufunc(x, y)))


_numpy = SimpleNamespace(**{**vars(np), "matmul": _Product})
_remove_noop_transforms = gpu_callbacks._remove_noop_transforms
_wgmma_of_refs = gpu_callbacks.wgmma
_interpreter = interpret_pallas_call.interpret_pallas_call
_arithmetic = jaxpr_interpret.JaxprInterpreter._interpret_arithmetic_primitive


def _interpret(*args: jax.Array, **params: Any) -> Any:
    """Run a kernel in one callback."""
    program, shapes = jax.make_jaxpr(functools.partial(_interpreter, **params), return_shape=True)(*args)
    return callback.io_callback(lambda *values: _WORKER.submit(jaxprs.evaluate, program, *values).result(), shapes, *args)


def _run_thread(jaxpr: Any, consts: Any, *args: Any) -> None:
    try:
        jaxprs.evaluate(ClosedJaxpr(jaxpr.jaxpr, consts), *args)
    except Exception as error:  # the others would wait for this thread
        gpu_callbacks._get_shared_memory().set_failed(error, None, top_level=False)
        raise


def _wgmma(*, a_allocation_key_as_array: Any, **operands: Any) -> Any:
    """`wgmma` whose operand A may be an array of floats, in registers, instead of the key of a buffer."""
    if jnp.issubdtype(a_allocation_key_as_array.dtype, jnp.integer):
        return _wgmma_of_refs(a_allocation_key_as_array=a_allocation_key_as_array, **operands)
    memory, thread = gpu_callbacks._get_shared_memory(), operands["thread"]

    def buffer(name: str) -> tuple[Any, Any, np.ndarray]:
        key = gpu_callbacks.HostAllocationKey.from_array(operands[f"{name}_allocation_key_as_array"])
        transforms = jax.tree.map(int, _without_layout(operands[f"{name}_transforms"]))
        place = memory.access(key, transforms)
        return key, place, memory.get_buffer_content(key, place, thread)[0]

    key, place, acc = buffer("acc")
    product = _Product(np.asarray(a_allocation_key_as_array), buffer("b")[2], acc.dtype)
    memory.store_buffer_content(key, place, acc + product, thread)
    return operands["token"]


def _without_layout(transforms: tuple) -> tuple:
    """Interpret mode ignores tiling and swizzling, so a reshape that only hides the tiles is void too."""
    return tuple(t for t in _remove_noop_transforms(transforms) if not isinstance(t, ReshapeTransform))


def _with_canonical_nan(self: Any, eqn: Any, get_invals: Any) -> Any:
    out = _arithmetic(self, eqn, get_invals)
    if eqn.primitive is lax.convert_element_type_p and eqn.params["new_dtype"] in (jnp.bfloat16, jnp.float16):
        (x,) = get_invals()
        bits = lax.bitcast_convert_type(out, jnp.uint16)
        return lax.bitcast_convert_type(jnp.where(jnp.isnan(x), jnp.uint16(0x7FFF), bits), out.dtype)
    return out


class _Array:
    """An array of the simulated memory, or a row of it."""

    def __init__(self, key: Any, row: np.ndarray | None) -> None:
        self.memory = gpu_callbacks._get_shared_memory()
        content = self.memory.mem[gpu_callbacks.HostAllocationKey.from_array(key)].content
        self.content = (content if row is None else content[int(row)]).reshape(-1)

    def read(self) -> np.ndarray:
        with self.memory.lock:
            return self.content.copy()

    def write(self, indices: np.ndarray, values: np.ndarray) -> None:
        with self.memory.lock:
            self.content[indices] = values

    def add_one(self, index: np.ndarray) -> np.ndarray:
        """What the element was before; no other warpgroup comes between."""
        with self.memory.lock:
            before = self.content[index].copy()
            self.content[index] += 1
            return before


def _inline(self: Any, eqn: Any, token: Any, get_invals: Any) -> tuple[Any, list]:
    """Run the stand-in for an instruction of `bi_jax.rows`."""
    instruction, values = eqn.params["mgpu_fn"].__self__, get_invals()
    assert isinstance(instruction, Instruction), instruction
    count = eqn.params["pytree_args"].num_leaves
    transforms = eqn.params["pytree_ref_transforms"].unflatten(values[count:])
    rows = [t[0].indices[0] if t else None for t in transforms[: instruction.references]]

    def callback_on_host(token: Any, rows: Any, *args: Any) -> tuple:
        args = [np.asarray(x) for x in args]
        arrays = [_Array(key, row) for key, row in zip(args, rows, strict=False)]
        until = time.monotonic() + LONGEST_WAIT
        while (results := warpgroup.run(instruction, *arrays, *args[len(arrays) :])) is None:
            assert time.monotonic() < until, "blocks run one after the other: a warpgroup can wait for its own block only"
            time.sleep(0.001)
        return token, *results

    shapes = [v.aval for v in eqn.outvars]
    shapes = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in shapes]
    token, *out = callback.io_callback(
        gpu_callbacks.fail_on_exception(callback_on_host),
        (gpu_callbacks.TOKEN_SHAPE_DTYPE, *shapes),
        token,
        rows,
        *values[:count],
    )
    return token, out


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels traced in this context run on the CPU and give the GPU's bits."""
    with (
        mock.patch.object(interpret_pallas_call, "interpret_pallas_call", _interpret),
        mock.patch.object(shared_memory, "_to_int", lambda x: x if isinstance(x, jax.core.Tracer) else int(x)),
        mock.patch.object(thread_map, "_run_jaxpr", _run_thread),
        mock.patch.object(gpu_callbacks, "np", _numpy),
        mock.patch.object(gpu_callbacks, "wgmma", _wgmma),
        mock.patch.object(gpu_callbacks, "_remove_noop_transforms", _without_layout),
        mock.patch.object(jaxpr_interpret.JaxprInterpreter, "_interpret_arithmetic_primitive", _with_canonical_nan),
        mock.patch.object(jaxpr_interpret.JaxprInterpreter, "_interpret_inline_mgpu_p", _inline),
        exact.emulated(_evaluate),
        plgpu.force_gpu_interpret_mode(),
    ):
        yield
