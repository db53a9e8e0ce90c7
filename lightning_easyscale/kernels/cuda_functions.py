"""The format's elementary functions in Triton: operation for operation those of `functions.h`.

Triton's own division, square root and `exp` flush denormals or approximate, and its compiler may fuse a product and a
sum. So the kernels are launched with fusion off, fused operations are written `tl.fma`, and division and square root
are PTX instructions whose rounding PTX defines.
"""

from __future__ import annotations

import os

import triton
import triton.language as tl

from .coefficients import POLYNOMIALS

# Triton's interpreter, which tests use, knows no PTX; NumPy's division and square root are rounded as PTX's.
_PTX: tl.constexpr = tl.constexpr(os.environ.get("TRITON_INTERPRET") != "1")
_MAGIC: tl.constexpr = tl.constexpr(12582912.0)
_MAGIC_BITS: tl.constexpr = tl.constexpr(0x4B400000)
_LOG2E: tl.constexpr = tl.constexpr(float.fromhex("0x1.715476p+0"))
_LN2_HIGH: tl.constexpr = tl.constexpr(float.fromhex("0x1.62e4p-1"))
_LN2_LOW: tl.constexpr = tl.constexpr(float.fromhex("0x1.7f7d1cp-20"))
_NORMAL: tl.constexpr = tl.constexpr(2.0**-126)
_TINY: tl.constexpr = tl.constexpr(2.0**-25)
_INF: tl.constexpr = tl.constexpr(float("inf"))
_EXP: tl.constexpr = tl.constexpr(POLYNOMIALS["EXP"])
_LOG: tl.constexpr = tl.constexpr(POLYNOMIALS["LOG"])
_TANH: tl.constexpr = tl.constexpr(POLYNOMIALS["TANH"])
_ERF: tl.constexpr = tl.constexpr(POLYNOMIALS["ERF"])
_ERFC: tl.constexpr = tl.constexpr(POLYNOMIALS["ERFC"])
_SIN: tl.constexpr = tl.constexpr(POLYNOMIALS["SIN"])
_COS: tl.constexpr = tl.constexpr(POLYNOMIALS["COS"])


@triton.jit
def divide(a, b):
    """Quotient, rounded to nearest, denormals kept."""
    if _PTX:
        return tl.inline_asm_elementwise(
            "div.rn.f32 $0, $1, $2;", "=f,f,f", [a, b], dtype=tl.float32, is_pure=True, pack=1
        )
    return a / b


@triton.jit
def square_root(x):
    """Square root, rounded to nearest, denormals kept."""
    if _PTX:
        return tl.inline_asm_elementwise("sqrt.rn.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    return tl.sqrt_rn(x)


@triton.jit
def _horner(x, C: tl.constexpr, N: tl.constexpr):
    y = tl.full(x.shape, C[N - 1], tl.float32)
    for i in tl.static_range(N - 1):
        y = tl.fma(y, x, tl.full(x.shape, C[N - 2 - i], tl.float32))
    return y


@triton.jit
def _like(x, C: tl.constexpr):
    return tl.full(x.shape, C, tl.float32)


@triton.jit
def _bits(x):
    return x.to(tl.int32, bitcast=True)


@triton.jit
def _from_bits(i):
    return i.to(tl.float32, bitcast=True)


@triton.jit
def _power_of_two(n):
    return _from_bits((n + 127) << 23)


@triton.jit
def _magnitude(x):
    return _from_bits(_bits(x) & 0x7FFFFFFF)


@triton.jit
def _with_sign_of(y, x):
    return _from_bits((_bits(y) & 0x7FFFFFFF) | (_bits(x) & -0x80000000))


@triton.jit
def _reduced_expm1(x):
    shifted = tl.fma(x, _like(x, _LOG2E), _like(x, _MAGIC))
    rounded = shifted - _MAGIC
    n = _bits(shifted) - _MAGIC_BITS
    r = tl.fma(rounded, _like(x, -_LN2_HIGH), x)
    r = tl.fma(rounded, _like(x, -_LN2_LOW), r)
    return tl.fma(r * r, _horner(r, _EXP, 6), r), n


@triton.jit
def exp(x):
    """Exponential function."""
    inside = tl.where(x < -104.0, -104.0, tl.where(x > 89.0, 89.0, x))
    p, n = _reduced_expm1(inside)
    half = n >> 1
    y = ((1.0 + p) * _power_of_two(half)) * _power_of_two(n - half)
    return tl.where(x != x, x, y)


@triton.jit
def expm1(x):
    """Exponential function minus 1."""
    inside = tl.where(x < -30.0, -30.0, tl.where(x > 89.0, 89.0, x))
    p, n = _reduced_expm1(inside)
    scale = _power_of_two(n - 1)
    y = 2.0 * tl.fma(scale, p, scale - 0.5)
    y = tl.where(_magnitude(x) < _TINY, x, y)
    return tl.where(x != x, x, y)


@triton.jit
def log(x):
    """Natural logarithm."""
    small = x < _NORMAL
    scaled = tl.where(small, x * 8388608.0, x)
    shifted = _bits(scaled) - 0x3F3504F3
    f = _from_bits((shifted & 0x7FFFFF) + 0x3F3504F3) - 1.0
    exponent = ((shifted >> 23) - tl.where(small, 23, 0)).to(tl.float32)
    square = f * f
    y = f * square * _horner(f, _LOG, 9)
    y = tl.fma(exponent, _like(x, _LN2_LOW), y)
    y = tl.fma(_like(x, -0.5), square, y)
    y = f + y
    y = tl.fma(exponent, _like(x, _LN2_HIGH), y)
    y = tl.where(x == _INF, _INF, y)
    y = tl.where(x == 0.0, -_INF, y)
    y = tl.where(x < 0.0, float("nan"), y)
    return tl.where(x != x, x, y)


@triton.jit
def log1p(x):
    """Natural logarithm of 1 + x."""
    u = 1.0 + x
    lost = x - (u - 1.0)
    y = log(u) + divide(lost, u)
    y = tl.where(x == -1.0, -_INF, tl.where(x == _INF, _INF, y))
    return tl.where(_magnitude(x) < _TINY, x, y)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    t = _magnitude(x)
    s = x * x
    small = tl.fma(x * s, _horner(s, _TANH, 6), x)
    capped = tl.where(t > 10.0, 10.0, t)
    large = 1.0 - divide(_like(x, 2.0), exp(2.0 * capped) + 1.0)
    y = tl.where(t < 0.625, small, _with_sign_of(large, x))
    y = tl.where(x == 0.0, x, y)
    return tl.where(x != x, x, y)


@triton.jit
def erf(x):
    """Error function."""
    t = _magnitude(x)
    s = x * x
    small = tl.fma(x, _horner(s, _ERF, 7), x)
    capped = tl.where(t > 4.0, 4.0, t)
    large = 1.0 - exp(-_horner(capped, _ERFC, 8))
    y = tl.where(t < 0.875, small, _with_sign_of(large, x))
    return tl.where(x != x, x, y)


@triton.jit
def philox(counter, key_low, key_high):
    """Four random words for each 64-bit counter."""
    c0 = counter.to(tl.uint32)
    c1 = (counter >> 32).to(tl.uint32)
    c2 = tl.zeros_like(c0)
    c3 = tl.zeros_like(c0)
    k0 = key_low.to(tl.uint32)
    k1 = key_high.to(tl.uint32)
    for _ in tl.static_range(10):
        m0 = tl.full(c0.shape, 0xD2511F53, tl.uint32)
        m1 = tl.full(c0.shape, 0xCD9E8D57, tl.uint32)
        n0 = tl.umulhi(m1, c2) ^ c1 ^ k0
        n2 = tl.umulhi(m0, c0) ^ c3 ^ k1
        c1 = m1 * c2
        c3 = m0 * c0
        c0 = n0
        c2 = n2
        k0 = k0 + tl.full((), 0x9E3779B9, tl.uint32)
        k1 = k1 + tl.full((), 0xBB67AE85, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def uniform_of(word):
    """A number in [0, 1) from the upper 24 bits."""
    return (word >> 8).to(tl.int32).to(tl.float32) * 5.9604644775390625e-08


@triton.jit
def normal_of(first, second):
    """Two standard normal numbers from two words."""
    u = ((first >> 8).to(tl.int32) + 1).to(tl.float32) * 5.9604644775390625e-08
    radius = square_root(-2.0 * log(u))
    v = uniform_of(second)
    quarter = tl.fma(_like(v, 4.0), v, _like(v, _MAGIC)) - _MAGIC
    f = tl.fma(quarter, _like(v, -0.25), v)
    s = f * f
    a = f * _horner(s, _SIN, 5)
    b = tl.fma(s, _horner(s, _COS, 4), _like(v, 1.0))
    q = quarter.to(tl.int32)
    odd = (q & 1) != 0
    sine = tl.where(odd, b, a)
    cosine = tl.where(odd, a, b)
    # Triton's minus subtracts from +0, which would lose the sign of a zero.
    sine = tl.where((q & 2) != 0, sine * -1.0, sine)
    cosine = tl.where(((q + 1) & 2) != 0, cosine * -1.0, cosine)
    return radius * cosine, radius * sine
