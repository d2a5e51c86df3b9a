"""NumPy's reference model in the place of the CPU engines of `bi_jax`: the same bits, and little for XLA to compile."""

import contextlib
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from bi_jax.gemm import cpu as gemm_cpu
from bi_jax.rows import cpu as rows_cpu
from shared_specs.formats import float_format
from shared_specs.reference import gemm as gemm_reference
from shared_specs.reference import rows as rows_reference


@contextlib.contextmanager
def model_engines():
    """What is lowered for a CPU in this context calls the model, and is not optimised: what is under test lies before XLA."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rows_cpu, "run_rows", functools.partial(_rows, rows_reference.run_rows))
        patch.setattr(rows_cpu, "run_columns", functools.partial(_rows, rows_reference.run_columns))
        patch.setattr(gemm_cpu, "gemm", _gemm)
        jax.clear_caches()
        jax.config.update("jax_disable_most_optimizations", True)
        yield
    jax.config.update("jax_disable_most_optimizations", False)
    jax.clear_caches()


def patterns(x):
    """The bits of an array of floats or integers."""
    x = np.ascontiguousarray(x)
    return x.view(float_format(x.dtype.name).storage) if x.dtype.name not in ("int32", "bool") else x


def _rows(run, program, inputs, scalars, dtypes, **_):
    names = (*program.sums,) if run is rows_reference.run_columns else (*program.outputs, *program.row_outputs)
    rows, n = inputs[program.elements[0]].shape
    shapes = dict.fromkeys(names, (n,))
    if run is rows_reference.run_rows:
        shapes = {name: (rows, n) if name in program.outputs else (rows,) for name in names}
    types = {name: jax.ShapeDtypeStruct(shapes[name], dtypes.get(name, jnp.float32)) for name in names}

    def on_the_host(inputs, scalars):
        outputs = run(program, {k: _values(x) for k, x in inputs.items()}, {k: _values(x) for k, x in scalars.items()})
        return {k: float_format(t.dtype.name).encode(outputs[k].reshape(t.shape)).view(t.dtype) for k, t in types.items()}

    return jax.pure_callback(on_the_host, types, dict(inputs), dict(scalars))


def _gemm(a, b, bias, *, alpha, beta, contract, out_dtype):
    out = jax.ShapeDtypeStruct((a.shape[0], a.shape[1], b.shape[2]), out_dtype)

    def on_the_host(a, b, bias):
        options = {"alpha": alpha, "beta": beta, "out_format": float_format(out.dtype.name)}
        if bias is not None:
            options |= {"bias_bits": patterns(bias), "bias_format": float_format(bias.dtype.name)}
        return gemm_reference(patterns(a), patterns(b), contract, **options).view(out.dtype)

    return jax.pure_callback(on_the_host, out, a, b, bias)


def _values(x):
    x = np.asarray(x)
    return x if x.dtype in (np.int32, np.float32) else float_format(x.dtype.name).decode(patterns(x))
