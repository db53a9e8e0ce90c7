"""The table of features, from the results of their tests."""

from __future__ import annotations

from collections.abc import Mapping
from importlib.metadata import version

_HEAD = """# Features of stock DDP under EasyScale, on CPU

Written by `EASYSCALE_FEATURE_TABLE=recipes/results/features_cpu.md pytest tests/integration/test_features.py`, never by
hand. *equal*: losses, parameters, buffers, optimizer state, metrics, files and what the scenario notes have the bits of
`Trainer(strategy="ddp", devices=N)` in N processes, on every rank and at every step. *not yet*: fails, for a known
cause. Placements are ESTs per executor.
"""


def table(results: Mapping[tuple[str, str, tuple[int, ...]], str]) -> str:
    """Markdown: one section per group, one line per feature and N."""
    groups: dict[str, dict[tuple[str, int], list[tuple[str, str]]]] = {}
    for (group, name, placement), outcome in results.items():
        rows = groups.setdefault(group, {})
        rows.setdefault((name, sum(placement)), []).append(("+".join(map(str, placement)), outcome))
    lines = [_HEAD, f"torch {version('torch')}, lightning {version('lightning')}."]
    for group, rows in groups.items():
        lines += ["", f"## {group}", "", "| feature | status | N | placements |", "|---|---|---|---|"]
        for (name, n), cells in rows.items():
            outcomes = {outcome for _, outcome in cells}
            status = outcomes.pop() if len(outcomes) == 1 else "; ".join(f"{p}: {o}" for p, o in cells)
            lines.append(f"| {name} | {status} | {n} | {', '.join(p for p, _ in cells)} |")
    return "\n".join(lines) + "\n"
