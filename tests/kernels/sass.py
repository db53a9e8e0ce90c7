"""Machine code of NVIDIA GPUs (SASS): how it is read, and what in it does not round as D2's format says.

Two approximations may stay, because what is made of them is exact. A reciprocal (``MUFU.RCP``) starts ``div.rn.f32``,
whose operands an ``FCHK`` checks, and divisions of whole numbers, which convert their divisor by ``I2F.RP``. A
reciprocal root (``MUFU.RSQ``) starts ``sqrt.rn.f32``. Operands that these sequences do not take go to routines of
NVIDIA's, known by their names, which round correctly as well.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from collections import Counter
from pathlib import Path

_ROUTINE = re.compile(r"^\$(?:__internal_\d+_\$)?([\w$]+):$", re.MULTILINE)
_INSTRUCTION = re.compile(r"^\s+/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)\s*([^;]*)", re.MULTILINE)
_ROUND_CORRECTLY = re.compile(r"__cuda_sm\d+x?_((div_rn_noftz|sqrt_rn)_f32_slowpath|(div|rem)_[su]64)")
_ROOT = "sqrt_rn_f32_slowpath"

# Instructions that may concern floating-point numbers, or add atomically, and those of them that the format takes.
_LOOKED_AT = re.compile(r"U?(F|H|MUFU|D(?!EPBAR))\w*|\w*MMA|U?(RED|ATOM)[A-Z]?")
_TAKEN = re.compile(
    r"U?(F(ADD|MUL|FMA)2?"  # one rounding, to nearest, denormals kept; 2: two at once
    r"|F(SEL|SETP|SET|MNMX3?)(\.(?!FTZ)\w+)*"  # nothing is rounded
    r"|F2I(\.\w+)*\.TRUNC(\.\w+)*"  # whole numbers; a denormal is 0 among them
    r"|MUFU\.(RCP|RSQ)|FMUL\.FTZ|FCHK"  # counted below
    r"|FLO(\.\w+)*|FENCE(\.\w+)*)"  # not floating point
)
_CONSTANT = re.compile(r"\w+, -RZ, RZ, [^R]*")  # HFMA2 that writes two halves of a constant
# What div.rn.f32 and sqrt.rn.f32 consist of.
_FUSED_IN_DIVISION, _FUSED_IN_ROOT, _SCALED_IN_ROOT = 5, 2, 2
_WORDS = {"fma": "FFMA", "mul": "FMUL", "add": "FADD"}


def disassembler() -> str | None:
    """Triton's ``nvdisasm``, or one that is installed."""
    import triton

    own = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "nvdisasm"
    return str(own) if own.exists() else shutil.which("nvdisasm")


def disassemble(cubin: bytes, folder: Path) -> str:
    """The machine code of one kernel as text."""
    tool, file = disassembler(), folder / "kernel.cubin"
    assert tool is not None
    file.write_bytes(cubin)
    return subprocess.run([tool, "--print-code", str(file)], capture_output=True, text=True, check=True).stdout


def _parts(text: str) -> tuple[str, list[str]]:
    """A kernel's own code, and the names of the routines that follow it."""
    own, *routines = _ROUTINE.split(text)
    return own, routines[::2]


def _counted(own: str) -> tuple[Counter[str], int, int]:
    """How often each instruction occurs; how many divisions of numbers and of whole numbers there are."""
    count = Counter(name for name, _ in _INSTRUCTION.findall(own))
    whole = sum(n for name, n in count.items() if re.fullmatch(r"U?I2F(\.\w+)*\.RP", name))
    return count, count["FCHK"], whole


def violations(text: str) -> list[str]:
    """What in the code of a kernel the format does not have."""
    own, routines = _parts(text)
    found = {f"routine {name}" for name in routines if not _ROUND_CORRECTLY.fullmatch(name)}
    for name, operands in _INSTRUCTION.findall(own):
        kind = name.split(".")[0]
        if kind == "HFMA2" and _CONSTANT.fullmatch(operands.strip()):
            continue
        if _LOOKED_AT.fullmatch(kind) and not _TAKEN.fullmatch(name):
            found.add(name)
    count, divisions, whole = _counted(own)
    roots = len(re.findall(rf"\bCALL\S* .*{_ROOT}", own))
    for name, there, known in (
        ("MUFU.RCP", count["MUFU.RCP"], divisions + whole),
        ("MUFU.RSQ", count["MUFU.RSQ"], roots),
        ("FMUL.FTZ", count["FMUL.FTZ"], _SCALED_IN_ROOT * roots),
    ):
        if there != known:
            found.add(f"{name} {there} times, {known} of them in correctly rounded operations")
    return sorted(found)


def arithmetic(text: str) -> dict[str, int]:
    """Operations beside divisions and roots: how many are fused, and how many products and sums are rounded alone."""
    own, _ = _parts(text)
    count, divisions, _ = _counted(own)
    inside = _FUSED_IN_DIVISION * divisions + _FUSED_IN_ROOT * count["MUFU.RSQ"]
    made = {word: count[name] + 2 * count[f"{name}2"] for word, name in _WORDS.items()}
    return {**made, "fma": made["fma"] - inside}


def asked_for(ptx: str) -> dict[str, int]:
    """The same of PTX, which the machine code is made of."""
    found = Counter(re.findall(r"\b(fma|mul|add|sub)\.(?:rn\.)?(f32x2|f32)\b", ptx))
    count = {word: found[word, "f32"] + 2 * found[word, "f32x2"] for word in ("fma", "mul", "add", "sub")}
    count["add"] += count.pop("sub")
    return count


def loops(ptx: str) -> bool:
    """Whether PTX branches back: the compiler may repeat a loop's body."""
    seen: set[str] = set()
    for label, target in re.findall(r"^\s*(?:(\$\w+):|(?:@!?%\w+\s+)?bra(?:\.uni)?\s+(\$\w+);)", ptx, re.MULTILINE):
        if target in seen:
            return True
        seen.add(label)
    return False
