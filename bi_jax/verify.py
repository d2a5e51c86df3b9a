"""Run the contracts on this machine's hardware and compare every bit: `python -m bi_jax.verify`.

Run it after a change of GPU, driver or compiler. The exit status is 1 if a bit differs from the reference model.
"""

import os
import sys
from collections.abc import Mapping
from functools import partial

import jax
import jaxlib
import numpy as np

import bi_jax
from bi_jax.rows import primitive
from shared_specs import verification
from shared_specs.formats import FloatFormat, float_format
from shared_specs.rows import ColumnProgram
from shared_specs.verification import Engine, GemmCase, Operands, RowCase

CPU_EVERY = 5
"""The part of the cases that a CPU runs by default: JAX compiles every shape, for a second or so on two cores."""


def engine(device: jax.Device, every: int | None = None) -> Engine:
    """JAX's engine for `device`, on every `every`-th of the small cases."""
    on_gpu = device.platform == "gpu"
    return Engine(
        name="mosaic" if on_gpu else "jax cpu",
        environment={"device": device.device_kind, "jax": jax.__version__, "jaxlib": jaxlib.__version__},
        gemm=lambda case, operands: run_gemm(case, operands, device),
        rows=lambda case, inputs: run_rows(case, inputs, device),
        large=on_gpu,
        every=every or (1 if on_gpu else CPU_EVERY),
        jobs=os.cpu_count() or 1,
    )


def run_gemm(case: GemmCase, operands: Operands, device: jax.Device) -> np.ndarray:
    """The op of `case`, jitted for `device`, bits in and bits out."""
    fmt = float_format(case.operand)
    a, b = _array(operands.a, fmt, device), _array(operands.b, fmt, device)
    bias = None if operands.bias is None else _array(operands.bias, fmt, device)
    op = partial(getattr(bi_jax, case.op), out_dtype=case.out)
    if case.op == "linear":
        result = jax.jit(op)(a, b, bias)
    elif bias is not None:
        result = jax.jit(partial(op, beta=case.beta, alpha=case.alpha))(bias, a, b)
    else:
        result = jax.jit(op)(a, b)
    return np.asarray(result).view(float_format(case.out).storage)


def run_rows(case: RowCase, inputs: Mapping[str, np.ndarray], device: jax.Device) -> dict[str, np.ndarray]:
    """The program of `case`, jitted for `device`, bits in and bits out."""
    program = case.spec()
    arrays = {}
    for name, x in inputs.items():
        ids = x.dtype == np.int32
        fmt = float_format("float32" if name in program.rows else case.dtype)
        arrays[name] = jax.device_put(x, device) if ids else _array(x, fmt, device)

    def execute(arrays: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
        if isinstance(program, ColumnProgram):
            return primitive.run_columns(program, arrays, case.scalars(), case.out_dtypes())
        return primitive.run_rows(program, arrays, case.scalars(), case.out_dtypes())

    results = jax.jit(execute)(arrays)
    return {name: np.asarray(results[name]).view(float_format(dtype).storage) for name, dtype in case.out_dtypes().items()}


def _array(bits: np.ndarray, fmt: FloatFormat, device: jax.Device) -> jax.Array:
    return jax.device_put(bits.view(jax.numpy.dtype(fmt.name)), device)


def main() -> int:
    """Verify the device that is chosen, a GPU if there is one."""
    parser = verification.command_line("python -m bi_jax.verify", "Compare bi_jax with the reference model, bit for bit.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default=None, help="default: JAX's own choice")
    args = parser.parse_args()
    return verification.main(engine(jax.local_devices(backend=args.device)[0], args.every), args.json)


if __name__ == "__main__":
    sys.exit(main())
