"""Run the contracts on this machine's hardware and compare every bit: `python -m bi_torch.verify`.

Run it after a change of GPU, driver or compiler. The exit status is 1 if a bit differs from the reference model.
"""

import os
import sys
from collections.abc import Mapping

import numpy as np
import torch
import triton

import bi_torch
from bi_torch.rows import cpu, cuda
from shared_specs import verification
from shared_specs.formats import FORMATS, FloatFormat, float_format
from shared_specs.rows import ColumnProgram
from shared_specs.verification import Engine, GemmCase, Operands, RowCase


def engine(device: str, every: int | None = None) -> Engine:
    """PyTorch's engine for `device` ("cpu" or "cuda"), on every `every`-th of the small cases."""
    on_gpu = device == "cuda"
    return Engine(
        name="triton" if on_gpu else "torch cpu",
        environment={
            "device": torch.cuda.get_device_name() if on_gpu else f"CPU, {torch.get_num_threads()} threads",
            "torch": torch.__version__,
            "triton": triton.__version__,
        },
        gemm=lambda case, operands: run_gemm(case, operands, device),
        rows=lambda case, inputs: run_rows(case, inputs, device),
        large=on_gpu,
        every=every or 1,
        jobs=min(16, os.cpu_count() or 1) if on_gpu else 1,
    )


def run_gemm(case: GemmCase, operands: Operands, device: str) -> np.ndarray:
    """The op of `case` on `device`, bits in and bits out."""
    fmt = float_format(case.operand)
    a, b = _tensor(operands.a, fmt, device), _tensor(operands.b, fmt, device)
    bias = None if operands.bias is None else _tensor(operands.bias, fmt, device)
    out_dtype = getattr(torch, case.out)
    op = getattr(bi_torch, case.op)
    if case.op == "linear":
        result = op(a, b, bias, out_dtype=out_dtype)
    elif bias is not None:
        result = op(bias, a, b, beta=case.beta, alpha=case.alpha, out_dtype=out_dtype)
    else:
        result = op(a, b, out_dtype=out_dtype)
    return _bits(result, float_format(case.out))


def run_rows(case: RowCase, inputs: Mapping[str, np.ndarray], device: str) -> dict[str, np.ndarray]:
    """The program of `case` on `device`, bits in and bits out."""
    program, executor = case.spec(), cuda if device == "cuda" else cpu
    tensors = {}
    for name, x in inputs.items():
        ids = x.dtype == np.int32
        fmt = float_format("float32" if name in program.rows else case.dtype)
        tensors[name] = torch.from_numpy(x).to(device) if ids else _tensor(x, fmt, device)
    dtypes = {name: getattr(torch, dtype) for name, dtype in case.out_dtypes().items()}
    if isinstance(program, ColumnProgram):
        results = executor.run_columns(program, tensors, case.scalars(), dtypes)
    else:
        results = executor.run_rows(program, tensors, case.scalars(), dtypes)
    return {name: _bits(results[name], FORMATS[dtype]) for name, dtype in case.out_dtypes().items()}


def _bits(x: torch.Tensor, fmt: FloatFormat) -> np.ndarray:
    return x.cpu().view(getattr(torch, fmt.storage.name)).numpy()


def _tensor(bits: np.ndarray, fmt: FloatFormat, device: str) -> torch.Tensor:
    return torch.from_numpy(bits).view(getattr(torch, fmt.name)).to(device)


def main() -> int:
    """Verify the device that is chosen, a GPU if there is one."""
    parser = verification.command_line("python -m bi_torch.verify", "Compare bi_torch with the reference model, bit for bit.")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    return verification.main(engine(args.device, args.every), args.json)


if __name__ == "__main__":
    sys.exit(main())
