"""Activations and elementary functions, the gated MLP and the rotary embedding: each element by itself."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp

from bi_jax.rows.arguments import IDS, array, check_shape
from bi_jax.rows.op import Op, row_op, run_program
from shared_specs.programs import pointwise as programs
from shared_specs.rotary import inverse_frequencies
from shared_specs.rows import RowProgram


def _unary(program: RowProgram, backward: RowProgram) -> Op:
    """The op of a function of one input, whose derivative is a program of the input and the cotangent, or the tangent."""
    backward_op = row_op(program.name, backward)
    return row_op(
        program.name,
        program,
        keep=("x",),
        gradient=lambda s, g: {"x": backward_op(s.x.dtype, x=s.x, g=g.y).dx},
        tangent=lambda s, t: {"y": backward_op(s.x.dtype, x=s.x, g=t.x).dx},
    )


_exp = _unary(programs.EXP, programs.EXP_BACKWARD)
_log = _unary(programs.LOG, programs.LOG_BACKWARD)
_sin = _unary(programs.SIN, programs.SIN_BACKWARD)
_cos = _unary(programs.COS, programs.COS_BACKWARD)
_erf = _unary(programs.ERF, programs.ERF_BACKWARD)
_tanh = _unary(programs.TANH, programs.TANH_BACKWARD)
_sigmoid = _unary(programs.SIGMOID, programs.SIGMOID_BACKWARD)
_rsqrt = _unary(programs.RSQRT, programs.RSQRT_BACKWARD)
_silu = _unary(programs.SILU, programs.SILU_BACKWARD)
_gelu = _unary(programs.GELU, programs.GELU_BACKWARD)
_gelu_tanh = _unary(programs.GELU_TANH, programs.GELU_TANH_BACKWARD)

_silu_mul_backward = row_op("silu_mul", programs.SILU_MUL_BACKWARD)


def _silu_mul_gradient(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    out = _silu_mul_backward(s.x.dtype, x=s.x, up=s.up, g=g.y)
    return {"x": out.dx, "up": out.dup}


_silu_mul = row_op("silu_mul", programs.SILU_MUL, keep=("x", "up"), gradient=_silu_mul_gradient)


def _turn(e: SimpleNamespace) -> dict[str, jax.Array]:
    """The pairs of x [*, D] turned by the angles whose cosines and sines [*, D / 2] broadcast against them."""
    return {"y": _on_pairs(programs.ROTARY, ("x1", "x2"), ("y1", "y2"), e.x, e)}


def _turn_tangent(s: SimpleNamespace, t: SimpleNamespace) -> dict[str, jax.Array]:
    return {"y": _on_pairs(programs.ROTARY, ("x1", "x2"), ("y1", "y2"), t.x, s)}


def _turn_back(s: SimpleNamespace, g: SimpleNamespace) -> dict[str, jax.Array]:
    return {"x": _on_pairs(programs.ROTARY_BACKWARD, ("g1", "g2"), ("dx1", "dx2"), g.y, s)}


def _on_pairs(
    program: RowProgram, inputs: tuple[str, str], outputs: tuple[str, str], x: jax.Array, e: SimpleNamespace
) -> jax.Array:
    half = x.shape[-1] // 2
    interleaved = e.interleaved is not None
    pair = (x[..., 0::2], x[..., 1::2]) if interleaved else (x[..., :half], x[..., half:])
    elements = dict(zip(inputs, pair, strict=True)) | {
        name: jnp.broadcast_to(getattr(e, name), pair[0].shape) for name in ("cos", "sin")
    }
    arguments = {name: _one_row(value) for name, value in elements.items()}
    results = run_program(program, SimpleNamespace(**arguments, dtype=x.dtype))
    turned = [results[name].reshape(pair[0].shape) for name in outputs]
    return jnp.stack(turned, axis=-1).reshape(x.shape) if interleaved else jnp.concatenate(turned, axis=-1)


# `interleaved` is an empty array or None, so that it is known when tracing.
_rotary = Op("rotary_embedding", _turn, keep=("cos", "sin", "interleaved"), gradient=_turn_back, tangent=_turn_tangent)
_rotary_tables = row_op("rotary_tables", programs.ROTARY_TABLES)


def exp(input: jax.Array) -> jax.Array:
    """e to the power of each element."""
    return _elementwise(_exp, input)


def log(input: jax.Array) -> jax.Array:
    """The natural logarithm of each element."""
    return _elementwise(_log, input)


def sin(input: jax.Array) -> jax.Array:
    """The sine of each element, in radians."""
    return _elementwise(_sin, input)


def cos(input: jax.Array) -> jax.Array:
    """The cosine of each element, in radians."""
    return _elementwise(_cos, input)


def erf(input: jax.Array) -> jax.Array:
    """The error function of each element."""
    return _elementwise(_erf, input)


def tanh(input: jax.Array) -> jax.Array:
    """The hyperbolic tangent of each element."""
    return _elementwise(_tanh, input)


def sigmoid(input: jax.Array) -> jax.Array:
    """1 / (1 + exp(-input))."""
    return _elementwise(_sigmoid, input)


def rsqrt(input: jax.Array) -> jax.Array:
    """1 / sqrt(input)."""
    return _elementwise(_rsqrt, input)


def silu(input: jax.Array) -> jax.Array:
    """input * sigmoid(input)."""
    return _elementwise(_silu, input)


def gelu(input: jax.Array, approximate: str = "none") -> jax.Array:
    """input * Phi(input), by erf, or with approximate="tanh" by the usual approximation with tanh."""
    if approximate not in ("none", "tanh"):
        raise ValueError(f"bi_jax.gelu: approximate must be 'none' or 'tanh', got {approximate!r}")
    return _elementwise(_gelu if approximate == "none" else _gelu_tanh, input)


def silu_mul(gate: jax.Array, up: jax.Array) -> jax.Array:
    """silu(gate) * up, rounded once: the gated MLP."""
    gate = array("silu_mul", "gate", gate)
    up = array("silu_mul", "up", up, (gate.dtype.name,))
    check_shape("silu_mul", "up", up, gate.shape)
    return _silu_mul(gate.dtype, x=_one_row(gate), up=_one_row(up)).y.reshape(gate.shape)


def rotary_embedding(x: jax.Array, cos: jax.Array, sin: jax.Array, interleaved: bool = False) -> jax.Array:
    """Turn the pairs of elements of x [*, D] by angles whose cosines and sines [*, D / 2] broadcast against it.

    Pair i is elements i and i + D / 2, or 2 i and 2 i + 1 if `interleaved`. The tables have no gradient.
    """
    x = array("rotary_embedding", "x", x)
    if not x.ndim or x.shape[-1] % 2:
        raise ValueError(f"bi_jax.rotary_embedding: the last dimension of x must be even, got {x.shape}")
    shape = (*x.shape[:-1], x.shape[-1] // 2)
    tables = {"cos": array("rotary_embedding", "cos", cos), "sin": array("rotary_embedding", "sin", sin)}
    for name, table in tables.items():
        own = (1,) * (len(shape) - table.ndim) + table.shape
        if len(own) != len(shape) or any(n not in (1, size) for n, size in zip(own, shape, strict=True)):
            raise ValueError(f"bi_jax.rotary_embedding: {name} must broadcast to {shape}, got {table.shape}")
    return _rotary(x.dtype, x=x, **tables, interleaved=jnp.zeros(0) if interleaved else None).y


def rotary_tables(positions: jax.Array, head_dim: int, theta: float = 10000.0) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines, float32 [*, head_dim / 2], of positions [*] times theta ** (-2 i / head_dim)."""
    positions = array("rotary_tables", "positions", positions, IDS)
    frequencies = jnp.asarray(inverse_frequencies(head_dim, theta))
    rows = positions.reshape(positions.size)
    out = _rotary_tables(frequency=jnp.broadcast_to(frequencies, (rows.size, frequencies.size)), position=rows)
    shape = (*positions.shape, frequencies.size)
    return out.cos.reshape(shape), out.sin.reshape(shape)


def _one_row(x: jax.Array) -> jax.Array:
    return x.reshape(1, x.size)


def _elementwise(op: Op, input: jax.Array) -> jax.Array:
    x = array(op.name, "input", input)
    return op(x.dtype, x=_one_row(x)).y.reshape(x.shape)
