"""Formulas on values in registers: what kernels of rows and of columns have in common."""

from collections.abc import Callable, Sequence

import jax

from bi_jax.rows.formulas import fold
from bi_jax.rows.ptx import Block, Level, Listing, Node, adjacent_pairs, needed
from bi_jax.rows.warpgroup import CHUNK, THREADS, VECTOR, Evaluate, EvaluateEither, Exchange, Ref, Shuffle, Unpack, Warps

WARP = 32


class Scope:
    """The values of nodes that are in registers, and how to get those that are not.

    Scopes nest: a chunk's in its segment's, that in its row's, that in the call's. What is computed for a scope stays in it,
    so a scope must not be used beyond the loop or the branch in which it was opened.
    """

    def __init__(
        self, level: Level, load: Callable[[Node], jax.Array], outer: "Scope | None" = None, size: int | None = None
    ) -> None:
        self.level, self.load, self.outer = level, load, outer
        self.size = size or (CHUNK if level == Level.ELEMENT else THREADS)
        self.values: dict[Node, jax.Array] = {}

    def find(self, node: Node) -> jax.Array | None:
        """The value of `node`, if there is one."""
        value = self.values.get(node)
        return self.outer.find(node) if value is None and self.outer else value

    def get(
        self,
        roots: Sequence[Node],
        dtypes: Sequence[str] | None = None,
        keep: Sequence[Node] = (),
        near: tuple[jax.Array, Sequence[Node]] | None = None,
    ) -> list[jax.Array]:
        """The values of `roots`, rounded to `dtypes`; those of `keep` stay in the scope.

        `near`: where it holds, for whole warps, and what then has the values of `roots` and of `keep`.
        """
        keep = [x for x in keep if self.find(x) is None]
        results = (*roots, *keep)
        others = () if near is None else tuple(near[1][: len(results)])
        _, leaves = needed((*results, *others), self._is_leaf)
        self.prepare(leaves)
        types = (*(dtypes or map(dtype_of, roots)), *map(dtype_of, keep))
        given, block = [*map(self.find, leaves)], Block(tuple(leaves), results)
        if near is None:
            values = Evaluate(block, types, self.size)(*given)
        else:
            values = EvaluateEither(block, types, self.size, Block(tuple(leaves), others))(near[0], *given)
        self.values.update(zip(keep, values[len(roots) :], strict=True))
        return values[: len(roots)]

    def prepare(self, nodes: Sequence[Node]) -> None:
        """Load or compute `nodes`, each in its own scope."""
        missing = [x for x in nodes if self.find(x) is None]
        if self.outer and (lower := [x for x in missing if x.level < self.level]):
            self.outer.prepare(lower)
        own = [x for x in missing if x.level == self.level or not self.outer]
        for node in own:
            if node.is_input:
                self.values[node] = self.load(node)
        if computed := [x for x in own if not x.is_input]:
            self.get([], keep=computed)

    def prepare_for(self, roots: Sequence[Node]) -> None:
        """Compute everything of this scope that `roots` need in a deeper one."""
        _, leaves = needed(roots, lambda x: x.is_input or (x.level <= self.level and x.kind != "bool"))
        self.prepare([x for x in leaves if x.level <= self.level])

    def load_for(self, roots: Sequence[Node], names: Sequence[str]) -> None:
        """Load the inputs called `names` that `roots` need."""
        _, leaves = needed(roots, lambda x: x.is_input or self.find(x) is not None)
        self.prepare([x for x in leaves if x.operation in names])

    def forget(self, names: Sequence[str]) -> None:
        """Drop the inputs called `names`: they are loaded again where they are needed again."""
        self.values = {node: value for node, value in self.values.items() if node.operation not in names}

    def _is_leaf(self, node: Node) -> bool:
        lower = node.level < self.level and node.kind != "bool"
        return lower or node.is_input or self.find(node) is not None


class Chunk(Scope):
    """The values of a chunk.

    Attributes:
        column: that of its first lane.
        end: the row's end, where the chunk may reach beyond it, else None.
    """

    def __init__(self, load: Callable[[Node], jax.Array], outer: Scope, column: jax.Array | int, end: int | None) -> None:
        super().__init__(Level.ELEMENT, load, outer)
        self.column, self.end = column, end


def dtype_of(node: Node) -> str:
    """The dtype of a value in registers."""
    return "float32" if node.kind == "float" else "int32"


def tree(kind: str, x: jax.Array, lanes: int, scratch: Ref, run: int = VECTOR) -> jax.Array:
    """A chunk reduced by `kind` over its groups of `lanes`: the adjacent pairs of `RowContract`. Each thread gets a value.

    Where a thread has two runs, even threads go on with the lower half of the lanes and odd ones with the upper half.
    """
    values, threads = Unpack()(x), lanes // VECTOR
    halves = [combined(kind, values[i : i + run]) for i in range(0, VECTOR, run)]
    apart = len(halves) > 1 and threads > 1
    value = combined(kind, Exchange()(*halves) if apart else halves)
    value = over_threads(kind, value, min(WARP, threads), 2 if apart else 1)
    if threads > WARP:
        value = combined(kind, Warps(threads // WARP)(scratch, value))
    return combined(kind, [value, Shuffle(1)(value)]) if apart else value


def over_warps(kind: str, value: jax.Array, lanes: int, scratch: Ref) -> jax.Array:
    """One value a thread reduced by `kind`, in any order, over the threads that hold `lanes` elements each."""
    threads = lanes // VECTOR
    value = over_threads(kind, value, min(WARP, threads))
    return combined(kind, Warps(threads // WARP)(scratch, value)) if threads > WARP else value


def over_threads(kind: str, value: jax.Array, threads: int, distance: int = 1) -> jax.Array:
    """One value a thread reduced by `kind` over groups of `threads`, those that are `distance` apart first."""
    while distance < threads:
        value = combined(kind, [value, Shuffle(distance)(value)])
        distance *= 2
    return value


def combined(kind: str, values: Sequence[jax.Array]) -> jax.Array:
    """Arrays reduced to one by adjacent pairs."""
    f, size = Listing(), values[0].shape[0]
    inputs = [f.input(f"x{i}", Level.ROW) for i in range(len(values))]
    root = adjacent_pairs(lambda x, y: fold(f, kind, x, y), inputs)
    return Evaluate(Block(tuple(inputs), (root,)), ("float32",), size)(*values)[0]
