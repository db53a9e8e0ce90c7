"""Compare two run records or two checkpoints, bit for bit.

``python -m lightning_easyscale.compare A B`` prints ``bitwise equal`` and what was compared, or names the first step,
EST and tensor that differ, with both values and their bits. Exit status: 0 equal, 1 different, 2 input that cannot be
used.

There is no tolerance anywhere, and silence is never equality: an entry that only one side holds is a difference. What
is not compared: events and headers (placements, versions, times), and state digests at steps where only one run was
asked for them; how many were compared is said. An EST that shares its optimizer state with the lead of its executor
records none of its own; rank 0 always does, and there it must be on both sides or on neither.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .digest import tensor_bytes
from .record import EstRecord, Record, RecordError, TensorBits

_SECTIONS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "epoch", "global_step", "easyscale")


class CompareError(ValueError):
    """Two things that cannot be compared; the message says why and what to do."""


@dataclass(frozen=True)
class Difference:
    """The first difference found.

    Args:
        what: the tensor, digest or checkpoint entry that differs.
        a: value on the first side, readable; None if it is missing there.
        b: value on the second side.
        step: optimizer steps done before it (a record's step), or after it for a state digest; None in a checkpoint.
        rank: the EST; None where the difference belongs to no single EST.
        batch: micro-batch over the whole job; None where it has no meaning.
        bits_a: the bits of the first element that differs, in hexadecimal, where they are known.
        bits_b: the bits on the second side.
    """

    what: str
    a: str | None
    b: str | None
    step: int | None = None
    rank: int | None = None
    batch: int | None = None
    bits_a: str | None = None
    bits_b: str | None = None

    def __str__(self) -> str:
        place = [
            f"step {self.step}" if self.step is not None else "",
            f"EST {self.rank}" if self.rank is not None else "",
        ]
        if self.batch is not None and self.batch != self.step:
            place.append(f"micro-batch {self.batch}")
        where = ", ".join([*place, self.what])
        lines = [f"first difference: {where}"]
        for side, value, bits in (("A", self.a, self.bits_a), ("B", self.b, self.bits_b)):
            shown = "missing" if value is None else value
            lines.append(f"  {side}: {shown}" + (f"  bits 0x{bits}" if bits else ""))
        if self.bits_a and self.bits_b and len(self.bits_a) == len(self.bits_b):
            xor = int(self.bits_a, 16) ^ int(self.bits_b, 16)
            width = len(self.bits_a)
            lines.append(f"  {bin(xor).count('1')} of {4 * width} bits differ, A xor B = 0x{xor:0{width}x}")
        return "\n".join(lines)


@dataclass
class Coverage:
    """What a comparison looked at, so that "equal" says equal in what."""

    entries: int = 0
    tensors: int = 0
    metrics: int = 0
    states: int = 0
    ranks: set[int] = field(default_factory=set)
    steps: set[int] = field(default_factory=set)
    sections: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        """One line."""
        if self.sections:
            return f"{self.tensors} entries of {', '.join(self.sections)}"
        return (
            f"{len(self.steps)} steps x {len(self.ranks)} ESTs, {self.tensors} tensors of {self.entries} micro-batches,"
            f" {self.metrics} metrics, {self.states} state digests"
        )


def compare(
    a: str | Path | Record,
    b: str | Path | Record,
    *,
    steps: tuple[int, int] | None = None,
    common: bool = False,
    sections: Sequence[str] | None = None,
) -> Difference | None:
    """Compare two records or two checkpoints bit for bit.

    Args:
        a: a record (loaded, or its directory) or a checkpoint file.
        b: the same kind of thing.
        steps: of records, only what training did in steps ``[first, end)``: entries of those steps, and the states and
            metrics that were reached after ``first + 1 .. end`` steps.
        common: of records, leave out what lies past the end of the shorter one.
        sections: of checkpoints, only these entries; default weights, optimizers, schedulers, loops, counters, and the
            ``easyscale`` entry if both have it.

    Returns:
        The first difference, in the order of training, then of EST rank; None if all is equal.

    Raises:
        CompareError: if the two are not of one kind, or one cannot be read.
    """
    return compare_covered(a, b, steps=steps, common=common, sections=sections)[0]


def compare_covered(
    a: str | Path | Record,
    b: str | Path | Record,
    *,
    steps: tuple[int, int] | None = None,
    common: bool = False,
    sections: Sequence[str] | None = None,
) -> tuple[Difference | None, Coverage]:
    """Like :func:`compare`, and what was looked at up to the first difference."""
    left, right = _load(a), _load(b)
    if isinstance(left, Record) and isinstance(right, Record):
        if sections:
            raise CompareError("`sections` restricts checkpoints, but these are records. HINT: use `steps`.")
        return _compare_records(left, right, steps, common)
    if isinstance(left, Record) or isinstance(right, Record):
        raise CompareError("one input is a run record, the other a checkpoint. HINT: give two of one kind.")
    if steps or common:
        raise CompareError("`steps` and `common` restrict records, but these are checkpoints. HINT: use `sections`.")
    return _compare_checkpoints(left, right, sections)


def _load(source: str | Path | Record) -> Record | dict[str, Any]:
    if isinstance(source, Record):
        return source
    path = Path(source)
    if not path.exists():
        raise CompareError(f"`{path}` does not exist.")
    if path.is_dir():
        try:
            return Record.load(path)
        except (RecordError, KeyError, TypeError, ValueError) as error:
            raise CompareError(str(error)) from error
    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged or foreign file
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise CompareError(f"`{path}` cannot be loaded as a checkpoint with weights_only=True: {reason}") from error
    if not isinstance(loaded, dict):
        raise CompareError(f"`{path}` holds a {type(loaded).__name__}, not a checkpoint dictionary.")
    return loaded


# ---------------------------------------------------------------------------------------------------------- records


def _compare_records(
    a: Record, b: Record, steps: tuple[int, int] | None, common: bool
) -> tuple[Difference | None, Coverage]:
    coverage = Coverage()
    if a.num_ests != b.num_ests:
        return Difference("number of ESTs", str(a.num_ests), str(b.num_ests)), coverage
    ranks = sorted({*a.ests, *b.ests})
    for rank in ranks:
        if rank not in a.ests or rank not in b.ests:
            one, two = ("recorded" if rank in side.ests else None for side in (a, b))
            return Difference("record of this EST", one, two, rank=rank), coverage
    keys_a, keys_b = ({r: _keys(side.ests[r], steps) for r in ranks} for side in (a, b))
    if common:
        for rank in ranks:
            end = min(keys[rank][-1][:2] if keys[rank] else (-1, -1) for keys in (keys_a, keys_b))
            keys_a[rank], keys_b[rank] = ([k for k in keys[rank] if k[:2] <= end] for keys in (keys_a, keys_b))
    timeline = sorted({(*key, rank) for rank in ranks for key in (*keys_a[rank], *keys_b[rank])})
    for step, order, batch, stage, rank in timeline:
        difference = _compare_entry(a.ests[rank], b.ests[rank], (step, order, batch, stage), coverage)
        coverage.ranks.add(rank)
        if difference is not None:
            return difference, coverage
    if not coverage.tensors:
        span = f" in steps {steps[0]}..{steps[1] - 1}" if steps else ""
        raise CompareError(f"the records hold no tensor to compare{span}. HINT: does `training_step` return its loss?")
    return None, coverage


_Key = tuple[int, int, int, str]  # (step of the timeline, 0 digest | 1 metrics | 2 micro-batch, batch, metrics' stage)


def _keys(est: EstRecord, steps: tuple[int, int] | None) -> list[_Key]:
    """All entries in order of time: at equal step count, what was reached comes before the next micro-batch."""
    first, end = steps or (-1, 1 << 62)
    keys: list[_Key] = [(s, 0, 0, "") for s in est.digests if first < s <= end]
    keys += [(m.step, 1, batch, stage) for (batch, stage), m in est.metrics.items() if first < m.step <= end]
    keys += [(s.step, 2, batch, "") for batch, s in est.steps.items() if first <= s.step < end]
    return sorted(keys)


def _compare_entry(a: EstRecord, b: EstRecord, key: _Key, coverage: Coverage) -> Difference | None:
    step, order, batch, stage = key
    if order == 0:
        return _compare_digests(a, b, step, coverage)
    if order == 1:
        one, two = a.metrics.get((batch, stage)), b.metrics.get((batch, stage))
    else:
        one, two = a.steps.get(batch), b.steps.get(batch)
    if one is None or two is None or one.step != two.step:
        left, right = (None if entry is None else f"recorded at step {entry.step}" for entry in (one, two))
        return Difference(f"{stage} metrics" if order == 1 else "micro-batch", left, right, step, a.rank, batch)
    for name in [*one.tensors, *(n for n in two.tensors if n not in one.tensors)]:
        bits = one.tensors.get(name), two.tensors.get(name)
        if bits[0] != bits[1]:
            what = f"{stage} metric `{name}`" if order == 1 else f"tensor `{name}`"
            return _bits_difference(what, *bits, step, a.rank, batch)
    if order == 1:
        coverage.metrics += len(one.tensors)
    else:
        coverage.entries += 1
        coverage.tensors += len(one.tensors)
        coverage.steps.add(step)
    return None


def _compare_digests(a: EstRecord, b: EstRecord, step: int, coverage: Coverage) -> Difference | None:
    one, two = a.digests.get(step), b.digests.get(step)
    if one is None or two is None:
        return None
    for name in sorted({*one, *two}):
        if name not in one or name not in two:
            if name == "optimizer" and a.rank != 0:
                continue  # shared with the executor's lead, which records it
            left, right = (states[name].total if name in states else None for states in (one, two))
            return Difference(name, left, right, step, a.rank)
        tensor = one[name].first_difference(two[name])
        if tensor is not None:
            left, right = (s[name].tensors.get(tensor) for s in (one, two))
            return Difference(f"digest of {name} `{tensor}`", left, right, step, a.rank)
        coverage.states += 1
    return None


# ------------------------------------------------------------------------------------------------------ checkpoints


def _compare_checkpoints(
    a: Mapping[str, Any], b: Mapping[str, Any], sections: Sequence[str] | None
) -> tuple[Difference | None, Coverage]:
    for section in sections or ():
        if section not in a and section not in b:
            raise CompareError(f"`sections={section!r}` is in neither checkpoint. HINT: they have {sorted({*a, *b})}.")
    chosen = list(sections or [s for s in _SECTIONS if s in a or s in b])
    if sections is None and not ("easyscale" in a and "easyscale" in b) and "easyscale" in chosen:
        chosen.remove("easyscale")  # a stock checkpoint has none: what both have is compared
    if not chosen:
        raise CompareError(f"neither input looks like a Lightning checkpoint. HINT: they have {sorted({*a, *b})}.")
    coverage = Coverage(sections=chosen)
    for section in chosen:
        one, two = ({"": s[section]} if section in s else {} for s in (a, b))
        difference = _compare_trees(one, two, section, coverage)
        if difference is not None:
            return difference, coverage
    return None, coverage


_MISSING = object()


def _compare_trees(a: Any, b: Any, path: str, coverage: Coverage) -> Difference | None:
    """Depth-first comparison of nested containers; order of mapping keys does not matter."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        pairs: Iterable[tuple[Any, Any, Any]] = [
            (key, a.get(key, _MISSING), b.get(key, _MISSING)) for key in [*a, *(k for k in b if k not in a)]
        ]
    elif isinstance(a, list | tuple) and isinstance(b, list | tuple) and type(a) is type(b):
        pairs = ((i, x, y) for i, (x, y) in enumerate(zip_longest(a, b, fillvalue=_MISSING)))
    else:
        return _compare_leaves(a, b, path, coverage)
    for key, x, y in pairs:
        found = _compare_trees(x, y, f"{path}.{key}" if key != "" else path, coverage)
        if found is not None:
            return found
    return None


def _compare_leaves(a: Any, b: Any, path: str, coverage: Coverage) -> Difference | None:
    coverage.tensors += 1
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        if a.dtype == b.dtype and a.shape == b.shape and _raw(a).equal(_raw(b)):
            return None
        return _tensor_difference(path, a, b)
    # repr keeps every bit of a float and tells True from 1, and nan from nan does not differ
    if type(a) is type(b) and (repr(a) == repr(b)):
        return None
    left, right = (None if side is _MISSING else _describe(side) for side in (a, b))
    return Difference(path, left, right)


def _raw(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    if tensor.layout is not torch.strided:
        tensor = tensor.to_dense()
    return tensor.resolve_conj().resolve_neg().contiguous().reshape(-1).view(torch.uint8)


def _bits_difference(
    what: str, a: TensorBits | None, b: TensorBits | None, step: int, rank: int, batch: int
) -> Difference:
    """The difference of two recorded tensors, down to the element where their bits are kept."""
    if a is not None and b is not None and (a.dtype, a.shape) == (b.dtype, b.shape) and a.exact and b.exact:
        found = _tensor_difference(what, a.tensor(), b.tensor())
        return replace(found, step=step, rank=rank, batch=batch)
    sides = [None if side is None else f"{side.dtype}{list(side.shape)} {side}" for side in (a, b)]
    return Difference(what, sides[0], sides[1], step, rank, batch)


def _tensor_difference(path: str, a: Tensor, b: Tensor) -> Difference:
    if a.dtype != b.dtype or a.shape != b.shape:
        return Difference(path, _describe(a), _describe(b))
    differs = (_raw(a) != _raw(b)).reshape(-1, a.element_size()).any(dim=1)
    index = int(differs.nonzero()[0])
    place = f"{path}, element {index} of {a.numel()} ({int(differs.sum())} differ)" if a.numel() > 1 else path
    one, two = (tensor.reshape(-1)[index] for tensor in (a, b))
    bits = [tensor_bytes(element)[::-1].hex() for element in (one, two)]  # most significant byte first
    return Difference(place, str(one.item()), str(two.item()), bits_a=bits[0], bits_b=bits[1])


def _describe(value: Any) -> str:
    if isinstance(value, Tensor):
        return f"{value.dtype} tensor of shape {list(value.shape)}"
    text = repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."


def main(argv: Sequence[str] | None = None) -> int:
    """Command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m lightning_easyscale.compare", description=__doc__.split("\n")[0])
    parser.add_argument("a", help="a run record (directory) or a checkpoint (.ckpt)")
    parser.add_argument("b", help="another of the same kind")
    parser.add_argument("--steps", nargs=2, type=int, metavar=("FIRST", "END"), help="records: steps FIRST..END-1 only")
    parser.add_argument("--common", action="store_true", help="records: up to the end of the shorter one")
    parser.add_argument("--sections", nargs="+", help=f"checkpoints: these entries only (of {', '.join(_SECTIONS)})")
    arguments = parser.parse_args(argv)
    steps = (arguments.steps[0], arguments.steps[1]) if arguments.steps else None
    try:
        difference, coverage = compare_covered(
            arguments.a, arguments.b, steps=steps, common=arguments.common, sections=arguments.sections
        )
    except CompareError as error:
        print(f"cannot compare: {error}", file=sys.stderr)
        return 2
    if difference is None:
        print(f"bitwise equal ({coverage})")
        return 0
    print(difference)
    return 1


if __name__ == "__main__":
    sys.exit(main())
