import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("hydra")
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from lightning_easyscale.simulation.policies import POLICIES  # noqa: E402

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
HEAD = "name,time,application,max_parallelism,batch_size,epochs,enable_heterogeneous_deterministic,preferred_gpu\n"


def simulate(tmp_path, *arguments):
    return subprocess.run(
        [sys.executable, "-m", "recipes.simulate", f"hydra.run.dir={tmp_path}/out", *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "Agg"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def test_every_policy_has_a_file_and_every_file_composes():
    files = {p.stem for p in (CONF / "policy").glob("*.yaml")}
    assert set(POLICIES) <= files
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for group in ("policy", "cluster", "trace"):
            for path in (CONF / group).glob("*.yaml"):
                assert OmegaConf.to_container(compose("simulate", [f"{group}={path.stem}"]))


def test_csv_run_writes_summary_jobs_figures_and_page(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(HEAD + "a,5,resnet50,4,64,2,0,v100\nb,7,bert,8,8,20,1,p100\n")
    done = simulate(tmp_path, "trace=csv", f"trace.path={trace}", "policy=all")
    assert done.returncode == 0, done.stdout + done.stderr
    out = tmp_path / "out"
    summary = json.loads((out / "summary.json").read_text())
    assert set(summary) == set(POLICIES)
    for name, numbers in summary.items():
        assert {"avg_jct_s", "makespan_s", "utilisation"} <= set(numbers)
        assert len(json.loads((out / f"{name}.json").read_text())["jobs"]) == 2
        assert (out / f"{name}.csv").read_text().count("\n") == 3
        assert (out / f"gantt_{name}.png").stat().st_size > 1000
    for figure in ("fig14.png", "fig15.png"):
        assert (out / figure).stat().st_size > 1000
    page = (out / "gantt.html").read_text()
    assert not re.search(r"(src|href)\s*=|https?://|@import", page)
    data = re.search(r"const DATA = (\{.*\});\n", page)
    assert set(json.loads(data.group(1))["runs"]) == set(POLICIES)


def test_compat_and_seeds_from_the_command_line(tmp_path, shared_data):
    done = simulate(
        tmp_path,
        "trace=csv",
        f"trace.path={shared_data / 'trace_68_jobs.csv'}",
        "compat=true",
        "policy=all",
        "figures=false",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fifo-serial"]["avg_jct_s"] == pytest.approx(8740.7, rel=0.01)
    done = simulate(tmp_path, "policy=paper", "repeats=3", "trace.num_jobs=10", "figures=false")
    assert done.returncode == 0, done.stdout + done.stderr
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["easyscale-homo"]["avg_jct_s_ci95"] > 0


def test_errors_are_one_clear_line(tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(HEAD + "a,5,resnet50,-4,64,2,0,v100\n")
    done = simulate(tmp_path, "trace=csv", f"trace.path={trace}")
    assert done.returncode == 2
    assert "line 2: `max_parallelism=-4`" in done.stdout
    assert "Traceback" not in done.stdout + done.stderr
    done = simulate(tmp_path, "trace=csv")
    assert done.returncode == 2
    assert "trace.path=VALUE" in done.stdout
