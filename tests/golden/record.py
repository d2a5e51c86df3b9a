"""Record the golden outputs on a Hopper GPU: `python -m tests.golden.record [FILE]`.

Single instructions go through the two kinds of tensor-core instruction that Hopper has, `wgmma` and `mma.sync`, which
must agree. Whole products go through `bi_torch`.
"""

import sys
from pathlib import Path

import numpy as np
import torch
import triton
import triton.language as tl

import bi_torch
from shared_specs.formats import FLOAT32, float_format
from tests.arrays import DTYPES, to_bits, to_torch
from tests.golden.cases import FILE, DotCase, GemmCase, dot_cases, gemm_cases


@triton.jit
def _dot(
    a_ptr, b_ptr, acc_ptr, out_ptr, M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, BLOCK_M: tl.constexpr, ACC: tl.constexpr
):
    """[BLOCK_M, N] rows of A @ B, on top of an accumulator if ACC."""
    row = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    col = tl.arange(0, N)
    k = tl.arange(0, K)
    a = tl.load(a_ptr + row[:, None] * K + k[None, :])
    b = tl.load(b_ptr + k[:, None] * N + col[None, :])
    place = row[:, None] * N + col[None, :]
    acc = tl.dot(a, b, tl.load(acc_ptr + place)) if ACC else tl.dot(a, b)
    tl.store(out_ptr + place, acc)


def record_dot(case: DotCase) -> np.ndarray:
    """float32 bits [m, n] of one case; both instructions must give them."""
    a_bits, b_bits, acc_bits = case.inputs()
    a, b = to_torch(a_bits, case.format).cuda(), to_torch(b_bits, case.format).cuda()
    acc = None if acc_bits is None else to_torch(acc_bits, FLOAT32).cuda()
    results = {}
    for instruction, block_m in (("wgmma", 64), ("mma.sync", 16)):
        out = torch.empty(case.m, case.n, device="cuda")
        kernel = _dot[(case.m // block_m,)](a, b, acc, out, case.m, case.n, case.k, block_m, acc is not None)
        if instruction not in kernel.asm["ptx"]:
            raise RuntimeError(f"{case.name}: the compiler did not use {instruction}")
        results[instruction] = to_bits(out.cpu())
    if not np.array_equal(*results.values()):
        raise RuntimeError(f"{case.name}: wgmma and mma.sync differ")
    return results["wgmma"]


def record_gemm(case: GemmCase) -> np.ndarray:
    """Bits [m, n] of one case."""
    fmt = float_format(case.dtype)
    a, b, bias = (to_torch(bits, fmt).cuda() for bits in case.inputs())
    out = bi_torch.addmm(bias, a, b, alpha=case.alpha, beta=case.beta, out_dtype=DTYPES[case.out_dtype])
    return to_bits(out.cpu())


def main() -> None:
    """Record every case into FILE."""
    target = Path(sys.argv[1]) if len(sys.argv) > 1 else FILE
    outputs = {case.name: record_dot(case) for case in dot_cases()}
    outputs |= {case.name: record_gemm(case) for case in gemm_cases()}
    np.savez_compressed(target, device=np.array(torch.cuda.get_device_name()), **outputs)
    print(f"{len(outputs)} cases on {torch.cuda.get_device_name()}: {target.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
