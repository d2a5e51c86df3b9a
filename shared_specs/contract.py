"""The GEMM contract: everything that decides the bits of an output, and nothing else.

A contract is looked up from the operand dtype alone. M, N, the tile sizes, the grid and the device are absent by
construction: they belong to the schedule (`shared_specs.schedule`), which may change freely without changing a bit.
"""

import hashlib
import json
from dataclasses import asdict, dataclass, fields
from functools import cached_property, lru_cache
from typing import Any, Self

from shared_specs.formats import float_format

VERSION = 1
"""Version of the contract's meaning; a change to any output bit needs a new number."""


def _is_power_of_two(n: int) -> bool:
    return n > 0 and n & (n - 1) == 0


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise ValueError(f"{field} {message}")


def _checked_fields(cls: type, data: Any) -> dict[str, Any]:
    if not isinstance(data, dict):
        raise ValueError(f"{cls.__name__} needs a JSON object, got {type(data).__name__}")
    names = {f.name for f in fields(cls)}
    if set(data) != names:
        raise ValueError(f"{cls.__name__} needs the fields {sorted(names)}, got {sorted(data)}")
    return data


@dataclass(frozen=True)
class DotArithmetic:
    """How one tensor-core instruction adds K products to its accumulator.

    The exact products and the accumulator are aligned to the largest exponent among them, or to `min_exponent` if that
    is larger; each is truncated to `fraction_bits` fractional bits, the sum is exact, the result truncated to float32.

    Attributes:
        name: the hardware family whose arithmetic this is.
        k: products per instruction.
        fraction_bits: fractional bits kept at alignment, relative to the largest exponent.
        min_exponent: the smallest exponent that terms are aligned to.
    """

    name: str
    k: int
    fraction_bits: int
    min_exponent: int

    def __post_init__(self) -> None:
        _require(bool(self.name), "DotArithmetic.name", "must not be empty")
        _require(_is_power_of_two(self.k), "DotArithmetic.k", f"must be a power of two, got {self.k}")
        _require(0 < self.fraction_bits < 53, "DotArithmetic.fraction_bits", f"must be in 1..52, got {self.fraction_bits}")


HOPPER_DOT = DotArithmetic(name="sm_90-wgmma", k=16, fraction_bits=25, min_exponent=-133)


@dataclass(frozen=True)
class Float32Split:
    """How a float32 operand becomes a sum of narrower parts, and how their products are summed.

    Part 0 is the float32 truncated to `part`; part 1 is the remainder rounded to nearest even, part 2 what is left: exact
    for 0 and |x| >= 2^-110, below that what lies under 2^-133 is rounded off. A non-finite operand is part 0 (a NaN the
    canonical one), its other parts are zero. Truncation cannot overflow; the rounding of part 1 makes the dropped
    products part 1 * part 2 as often negative as positive, so that all-positive data does not drift.

    For every `promote_k` elements of K, in ascending order, two chains of dot instructions start at +0: the product
    part 0 * part 0, and the products listed in `cross`, one after the other. Tensor cores truncate, so the chains are
    short, and what they give is added in float32, rounded to nearest (Dekker's fast two-sum; both sums start at +0):

        total = high + high_chain
        error = high_chain - (total - high)
        cross = cross + (cross_chain + error)
        high = total

    The accumulator is high + cross, or high alone where high is not finite.

    Attributes:
        part: format of a part.
        parts: number of parts.
        cross: (part of A, part of B) of the products beside (0, 0), in the order in which a chain runs them.
        promote_k: elements of K per chain, a multiple of the dot instruction's k.
    """

    part: str = "bfloat16"
    parts: int = 3
    cross: tuple[tuple[int, int], ...] = ((2, 0), (0, 2), (1, 1), (1, 0), (0, 1))
    promote_k: int = 64

    def __post_init__(self) -> None:
        float_format(self.part)
        object.__setattr__(self, "cross", tuple((int(i), int(j)) for i, j in self.cross))
        _require(self.parts >= 1, "Float32Split.parts", f"must be positive, got {self.parts}")
        in_range = all(0 <= i < self.parts and 0 <= j < self.parts for i, j in self.cross)
        _require(in_range, "Float32Split.cross", f"names a part outside 0..{self.parts - 1}")
        distinct = len({(0, 0), *self.cross}) == len(self.cross) + 1
        _require(distinct, "Float32Split.cross", "must not repeat a product, nor hold (0, 0)")
        _require(self.promote_k > 0, "Float32Split.promote_k", f"must be positive, got {self.promote_k}")


@dataclass(frozen=True)
class GemmContract:
    """The bits of one output of a GEMM, as a function of its row of A, its column of B and its bias.

    K is cut into `k_leaves` leaves (see `leaf_bounds`). A leaf is one ascending chain of dot instructions from a +0
    accumulator, its K zero-filled to a multiple of the instruction's. The leaves are summed in float32, rounded to
    nearest, by a tree over adjacent pairs. The epilogue is alpha * acc, beta * bias and their sum, each rounded once to
    float32, then one rounding to the output dtype; a NaN is stored as the format's canonical pattern.

    Attributes:
        operand: dtype of A and B.
        dot: arithmetic of one dot instruction.
        split: how float32 operands reach the dot instruction; None for the 16-bit formats.
        k_leaves: number of leaves, a power of two; 1 unless a caller splits K on purpose (tensor parallelism).
        version: version of the contract's meaning.
    """

    operand: str
    dot: DotArithmetic = HOPPER_DOT
    split: Float32Split | None = None
    k_leaves: int = 1
    version: int = VERSION

    def __post_init__(self) -> None:
        wide = float_format(self.operand).bits == 32
        _require(
            wide == (self.split is not None),
            "GemmContract.split",
            f"must be given exactly for float32, operand is {self.operand}",
        )
        if self.split is not None:
            whole = self.split.promote_k % self.dot.k == 0
            _require(
                whole, "Float32Split.promote_k", f"must be a multiple of the dot's k = {self.dot.k}, got {self.split.promote_k}"
            )
        _require(_is_power_of_two(self.k_leaves), "GemmContract.k_leaves", f"must be a power of two, got {self.k_leaves}")
        _require(self.version == VERSION, "GemmContract.version", f"is {self.version}, this library implements {VERSION}")

    @property
    def chain_k(self) -> int:
        """The K step that every schedule's tile must be a multiple of."""
        return self.dot.k if self.split is None else self.split.promote_k

    def leaf_bounds(self, k: int) -> tuple[tuple[int, int], ...]:
        """[start, stop) of each leaf of a K of `k`: equal leaves, rounded up to `chain_k`, the last ones possibly empty."""
        size = -(-k // (self.k_leaves * self.chain_k)) * self.chain_k
        return tuple((min(i * size, k), min((i + 1) * size, k)) for i in range(self.k_leaves))

    def to_json(self) -> str:
        """The canonical form: sorted keys, no spaces. Equal contracts, and only they, have equal forms."""
        return json.dumps(asdict(self), sort_keys=True, separators=(",", ":"))

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The contract whose canonical form is `text`.

        Raises:
            ValueError: a field is missing, unknown or invalid.
        """
        data = _checked_fields(cls, json.loads(text))
        split = data["split"]
        return cls(
            **{
                **data,
                "dot": DotArithmetic(**_checked_fields(DotArithmetic, data["dot"])),
                "split": None if split is None else Float32Split(**_checked_fields(Float32Split, split)),
            }
        )

    @cached_property
    def contract_id(self) -> str:
        """A readable name with the SHA-256 of the canonical form: what a trainer and a sampler compare."""
        digest = hashlib.sha256(self.to_json().encode()).hexdigest()
        return f"gemm-v{self.version}-{self.operand}-{self.dot.name}-{digest}"


@lru_cache
def gemm_contract(operand: str, k_leaves: int = 1) -> GemmContract:
    """The contract for operands of dtype `operand` ("bfloat16", "float16" or "float32").

    Raises:
        ValueError: the dtype is not supported or `k_leaves` is not a power of two.
    """
    split = Float32Split() if operand == "float32" else None
    return GemmContract(operand=operand, split=split, k_leaves=k_leaves)
