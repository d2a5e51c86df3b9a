"""One call of each public function: the shapes of its arguments, with 40 elements of K."""

CALLS = {
    "mm": ((6, 40), (40, 5)),
    "addmm": ((5,), (6, 40), (40, 5)),
    "bmm": ((3, 6, 40), (3, 40, 5)),
    "baddbmm": ((3, 1, 5), (3, 6, 40), (3, 40, 5)),
    "matmul": ((2, 1, 6, 40), (3, 40, 5)),
    "linear": ((2, 6, 40), (5, 40), (5,)),
}
