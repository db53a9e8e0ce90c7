"""Simulate a cluster under scheduling policies (EasyScale's Figs. 14 and 15).

Writes into the run's directory: ``summary.json`` (policy -> numbers) and ``summary.csv``, one JSON and one CSV per
policy (per job: submission, start, finish, devices over time), ``fig14.png``, ``fig15.png``, Gantt views as PNG and as
one self-contained page ``gantt.html``. Without arguments it runs every policy on a generated trace.
"""

from __future__ import annotations

import csv
import json
import shlex
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, MissingMandatoryValue, OmegaConf
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from lightning_easyscale.simulation.cluster import ClusterSpec
from lightning_easyscale.simulation.result import Result

from ._console import make_console
from ._simulate_figures import draw_figures
from ._simulate_html import gantt_page
from ._simulate_run import compare, load_profile, load_trace, policy_names, simulate, summarise

_COLUMNS = {
    "avg_jct_s": "avg JCT s",
    "median_jct_s": "median s",
    "p95_jct_s": "p95 s",
    "avg_jct_over_easyscale_best": "JCT / best's",
    "makespan_s": "makespan s",
    "avg_queueing_s": "queueing s",
    "utilisation": "utilisation",
    "median_rho": "median rho",
    "rescales": "rescales",
    "preemptions": "preempt.",
    "wall_s": "wall s",
}
_FINE = ("median_rho", "wall_s", "avg_jct_over_easyscale_best")


def run_all(config: dict[str, Any], console: Console) -> tuple[dict[str, dict[str, Any]], dict[str, Result]]:
    """Run every policy on every seed; summaries, and the first seed's results."""
    cluster = ClusterSpec(dict(config["cluster"]["devices"]), config["cluster"]["devices_per_node"])
    profile = load_profile(config)
    names = policy_names(config)
    repeats = config["repeats"] if config["trace"]["format"] == "generated" else 1
    traces = [load_trace(config, profile, cluster, config["seed"] + i) for i in range(repeats)]
    for note in traces[0].notes:
        console.print(f"[dim]{note}[/dim]", highlight=False, markup=True, soft_wrap=True)
    columns = (TextColumn("{task.description:16}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    summaries: dict[str, dict[str, Any]] = {}
    first: dict[str, Result] = {}
    jcts: dict[str, list[float]] = {}
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        for name in names:
            task = progress.add_task(name, total=sum(len(t.jobs) for t in traces))
            runs: list[Result] = []
            for trace in traces:
                before = sum(len(r.records) for r in runs)

                def advance(done: int, before: int = before, task: Any = task) -> None:
                    progress.update(task, completed=before + done)

                runs.append(simulate(config, name, trace, profile, cluster, on_progress=advance))
            summaries[name], first[name] = summarise(runs), runs[0]
            jcts[name] = [float(run.summary()["avg_jct_s"]) for run in runs]
    for name, (ratio, error) in compare(jcts).items():
        summaries[name]["avg_jct_over_easyscale_best"] = ratio
        summaries[name]["avg_jct_over_easyscale_best_ci95"] = error
    return summaries, first


def show(summaries: dict[str, dict[str, Any]], console: Console) -> None:
    """Print the summary table."""
    table = Table(title=None)
    table.add_column("policy")
    shown = {key: title for key, title in _COLUMNS.items() if key in next(iter(summaries.values()))}
    for title in shown.values():
        table.add_column(title, justify="right")
    for name, summary in summaries.items():
        cells = []
        for key in shown:
            digits = 3 if key == "utilisation" else 2 if key in _FINE else 0
            text = f"{summary[key]:.{digits}f}"
            if f"{key}_ci95" in summary:
                text += f" ±{summary[f'{key}_ci95']:.{digits}f}"
            cells.append(text)
        table.add_row(name, *cells)
    console.print(table)


def write(out: Path, config: dict[str, Any], summaries: dict[str, dict[str, Any]], results: dict[str, Result]) -> None:
    """Write all outputs."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "summary.json").write_text(json.dumps(summaries, indent=1), encoding="utf-8")
    with (out / "summary.csv").open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, fieldnames=list(next(iter(summaries.values()))), lineterminator="\n")
        writer.writeheader()
        writer.writerows(summaries.values())
    (out / "config.json").write_text(json.dumps(config, indent=1), encoding="utf-8")
    for name, result in results.items():
        (out / f"{name}.json").write_text(result.to_json(), encoding="utf-8")
        (out / f"{name}.csv").write_text(result.to_csv(), encoding="utf-8")
    if config["figures"]:
        draw_figures(out, summaries, results, compat=config["compat"], gantt_jobs=config["gantt_jobs"])
        (out / "gantt.html").write_text(gantt_page(results, config["gantt_jobs"]), encoding="utf-8")


def keep(file: Path, out: Path, overrides: Sequence[str], results: Mapping[str, Result]) -> None:
    """Write a run's command, notes and summaries into one file, and copy its figures beside it.

    Args:
        file: the JSON file.
        out: the run's directory, with everything that `write` wrote.
        overrides: what the command line set.
        results: of the first seed.
    """
    words = []
    for word in overrides:
        key, _, value = word.partition("=")
        if key != "keep" and not key.startswith("hydra."):
            words.append(f"{key}={Path(value).name}" if key.endswith(".path") else word)
    some = next(iter(results.values()))
    body = {
        "command": shlex.join(["python", "-m", "recipes.simulate", *words]),
        "notes": some.notes,
        "types": some.types,
        "capacity": some.capacity,
        "summary": {
            policy: {key: round(value, 4) if isinstance(value, float) else value for key, value in numbers.items()}
            for policy, numbers in json.loads((out / "summary.json").read_text(encoding="utf-8")).items()
        },
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(body, indent=1), encoding="utf-8")
    for figure in sorted(out.glob("fig1[45].png")):
        shutil.copy(figure, file.with_name(f"{file.stem}_{figure.name}"))


@hydra.main(version_base="1.3", config_path="../conf", config_name="simulate")
def main(config: DictConfig) -> float:
    """Run, print, write; returns the first policy's average JCT, for sweeps."""
    console = make_console(width=200)
    try:
        plain: Any = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
        summaries, results = run_all(plain, console)
    except MissingMandatoryValue as error:
        console.print(f"[bold red]missing[/]: {error.full_key}. HINT: give {error.full_key}=VALUE.", highlight=False)
        sys.exit(2)
    except (ValueError, KeyError, FileNotFoundError) as error:
        console.print(f"[bold red]{type(error).__name__}[/]: {error.args[0]}", highlight=False, soft_wrap=True)
        sys.exit(2)
    show(summaries, console)
    out = Path(HydraConfig.get().runtime.output_dir)
    write(out, plain, summaries, results)
    if plain["keep"]:
        keep(Path(plain["keep"]), out, HydraConfig.get().overrides.task, results)
    console.print(f"written to {out}", soft_wrap=True)
    return float(next(iter(summaries.values()))["avg_jct_s"])


if __name__ == "__main__":
    main()
