"""Instruction sequences that the kernels of both frameworks contain, as the inline assembly of LLVM writes them."""

SPLIT = """{
.reg .b32 low, high;
.reg .f32 x, y;
cvt.rz.bf16x2.f32 $0, $4, $3;
shl.b32 low, $0, 16;
and.b32 high, $0, 0xFFFF0000;
sub.rn.f32 x, $3, low;
sub.rn.f32 y, $4, high;
cvt.rn.bf16x2.f32 $1, y, x;
shl.b32 low, $1, 16;
and.b32 high, $1, 0xFFFF0000;
sub.rn.f32 x, x, low;
sub.rn.f32 y, y, high;
cvt.rn.bf16x2.f32 $2, y, x;
}"""
"""The three parts $0, $1, $2 of the float32 $3 and $4, as `contract.Float32Split` cuts them: each two bfloat16 in a register.

`cvt` makes a NaN canonical, as the contract asks of part 0.
"""

SPLIT_REGISTERS = "=&r,=&r,=&r,f,f"

WIDEN = """{
.reg .b32 half;
shl.b32 half, $2, 16;
mov.b32 $0, half;
and.b32 half, $2, 0xFFFF0000;
mov.b32 $1, half;
}"""
"""The two bfloat16 in $2 as the float32 $0 and $1, whose upper halves they are: two instructions, which `cvt` is not always."""

WIDEN_REGISTERS = "=f,=f,r"
