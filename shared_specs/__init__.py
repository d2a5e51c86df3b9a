"""The one truth that every engine reads: the contract that fixes bits, the schedules that do not, and the formats."""

from shared_specs.contract import HOPPER_DOT, DotArithmetic, Float32Split, GemmContract, gemm_contract
from shared_specs.formats import BFLOAT16, FLOAT16, FLOAT32, FloatFormat, float_format
from shared_specs.schedule import ARCHITECTURES, GemmSchedule, gemm_schedule, schedule_table

__all__ = [
    "ARCHITECTURES",
    "BFLOAT16",
    "FLOAT16",
    "FLOAT32",
    "HOPPER_DOT",
    "DotArithmetic",
    "Float32Split",
    "FloatFormat",
    "GemmContract",
    "GemmSchedule",
    "float_format",
    "gemm_contract",
    "gemm_schedule",
    "schedule_table",
]
