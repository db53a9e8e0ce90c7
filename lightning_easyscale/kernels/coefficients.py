"""Coefficients of the format's polynomials: one table from which the C++ and the Triton kernels are both made.

Each polynomial was fitted in double precision (iteratively reweighted least squares against 40-digit values) and its
coefficients were rounded to fp32, lowest power first. All are evaluated by Horner's scheme, one fused multiply-add per
step.
"""

from __future__ import annotations

POLYNOMIALS: dict[str, tuple[float, ...]] = {
    # (exp(r) - 1 - r) / r^2 on |r| <= ln(2)/2
    "EXP": tuple(
        float.fromhex(c)
        for c in ("0x1.0p-1", "0x1.555554p-3", "0x1.555486p-5", "0x1.11128p-7", "0x1.6d945ep-10", "0x1.9f02dp-13")
    ),
    # (log(1 + f) - f + f^2/2) / f^3 on sqrt(1/2) <= 1 + f <= sqrt(2)
    "LOG": tuple(
        float.fromhex(c)
        for c in (
            *("0x1.555548p-2", "-0x1.000006p-2", "0x1.99a4b6p-3", "-0x1.555c4ep-3", "0x1.233766p-3"),
            *("-0x1.fc220ep-4", "0x1.e6f08cp-4", "-0x1.de3bf8p-4", "0x1.14573ep-4"),
        )
    ),
    # (tanh(x) / x - 1) / x^2 as a polynomial in x^2, on |x| <= 0.625
    "TANH": tuple(
        float.fromhex(c)
        for c in (
            "-0x1.555554p-2",
            "0x1.111066p-3",
            "-0x1.b9ee9p-5",
            "0x1.638b56p-6",
            "-0x1.0bf4f6p-7",
            "0x1.18e1c4p-9",
        )
    ),
    # erf(x) / x - 1 as a polynomial in x^2, on |x| <= 0.875
    "ERF": tuple(
        float.fromhex(c)
        for c in (
            *("0x1.06eba8p-3", "-0x1.812744p-2", "0x1.ce2e8ep-4", "-0x1.b81a72p-6", "0x1.5542a4p-8"),
            *("-0x1.aec8ap-11", "0x1.6cdc6ep-14"),
        )
    ),
    # -log(erfc(t)) on 0.84 <= t <= 4
    "ERFC": tuple(
        float.fromhex(c)
        for c in (
            *("-0x1.3d8606p-13", "0x1.21205cp+0", "0x1.446544p-1", "0x1.ba6a98p-4", "-0x1.98a702p-6"),
            *("0x1.0cdaep-8", "-0x1.b8704cp-12", "0x1.4ca3d8p-16"),
        )
    ),
    # sin(2 pi f) / f as a polynomial in f^2, on |f| <= 1/8
    "SIN": tuple(
        float.fromhex(c)
        for c in ("0x1.921fb6p+2", "-0x1.4abbcep+5", "0x1.466bbap+6", "-0x1.32ca9ep+6", "0x1.4bc89ap+5")
    ),
    # (cos(2 pi f) - 1) / f^2 as a polynomial in f^2, on |f| <= 1/8
    "COS": tuple(float.fromhex(c) for c in ("-0x1.3bd3ccp+4", "0x1.03c1dep+6", "-0x1.55c664p+6", "0x1.d9f7bap+5")),
}


def c_header() -> str:
    """The table as C++ constants."""
    lines = (
        f"constexpr float {name}[{len(values)}] = {{{', '.join(f'{value.hex()}f' for value in values)}}};\n"
        for name, values in POLYNOMIALS.items()
    )
    return "#pragma once\n" + "".join(lines)
