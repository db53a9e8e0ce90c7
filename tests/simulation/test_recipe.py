import json
import re
import shlex
import sys
from itertools import zip_longest
from pathlib import Path

import pytest

pytest.importorskip("hydra")
from hydra import compose, initialize_config_dir  # noqa: E402
from omegaconf import OmegaConf  # noqa: E402

from lightning_easyscale.simulation.compat import POLICIES as PUBLISHED  # noqa: E402
from lightning_easyscale.simulation.compat import PUBLISHED_RESCALE_S  # noqa: E402
from lightning_easyscale.simulation.policies import POLICIES  # noqa: E402
from lightning_easyscale.simulation.policy import Costs  # noqa: E402
from recipes._simulate_run import policy_names  # noqa: E402
from recipes.simulate import main  # noqa: E402

ROOT = Path(__file__).parents[2]
CONF = ROOT / "conf"
RESULTS = ROOT / "recipes" / "results"
HEAD = "name,time,application,max_parallelism,batch_size,epochs,enable_heterogeneous_deterministic,preferred_gpu\n"


@pytest.fixture
def simulate(tmp_path, monkeypatch, capsys):
    """Run the recipe in this process: exit status and what it printed."""

    def run(*arguments):
        quiet = ("hydra/job_logging=none", "hydra/hydra_logging=none")
        monkeypatch.setattr(sys, "argv", ["simulate", f"hydra.run.dir={tmp_path}/out", *quiet, *arguments])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code
        return status, capsys.readouterr().out

    return run


def test_every_policy_has_a_file_and_every_file_composes():
    files = {p.stem for p in (CONF / "policy").glob("*.yaml")}
    assert set(POLICIES) <= files
    groups = ("policy", "cluster", "trace")
    found = [sorted((CONF / group).glob("*.yaml")) for group in groups]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        for chosen in zip_longest(*found):  # a file of each group at a time
            options = [f"{group}={path.stem}" for group, path in zip(groups, chosen, strict=True) if path]
            config = OmegaConf.to_container(compose("simulate", options))
            for group, path in zip(groups, chosen, strict=True):
                assert path is None or config[group] == OmegaConf.to_container(OmegaConf.load(path))


def test_csv_run_writes_summary_jobs_figures_and_page(simulate, tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(HEAD + "a,5,resnet50,4,64,2,0,v100\nb,7,bert,8,8,20,1,p100\n")
    status, printed = simulate("trace=csv", f"trace.path={trace}", "policy=all")
    assert status == 0, printed
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


def test_compat_from_the_command_line(simulate, tmp_path, shared_data):
    trace = f"trace.path={shared_data / 'trace_68_jobs.csv'}"
    status, printed = simulate("trace=csv", trace, "compat=true", "policy=fifo-serial", "figures=false")
    assert status == 0, printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["fifo-serial"]["avg_jct_s"] == pytest.approx(8740.7, rel=0.01)
    assert policy_names({"compat": True, "policy": {"names": ["all"]}}) == list(PUBLISHED)


def test_seeds_give_confidence_intervals_and_a_run_is_kept_in_one_file(simulate, tmp_path):
    kept = tmp_path / "kept" / "run.json"
    options = ["policy=paper", "repeats=3", "trace.num_jobs=10", "figures=false"]
    status, printed = simulate(*options, f"keep={kept}")
    assert status == 0, printed
    summary = json.loads((tmp_path / "out" / "summary.json").read_text())
    assert summary["easyscale-homo"]["avg_jct_s_ci95"] > 0
    found = json.loads(kept.read_text())
    assert found["command"] == " ".join(["python -m recipes.simulate", *options])
    assert found["capacity"] == [32, 16, 16]
    assert found["summary"]["easyscale-homo"]["avg_jct_s"] == round(summary["easyscale-homo"]["avg_jct_s"], 4)


@pytest.mark.parametrize("name", [p.stem for p in sorted(RESULTS.glob("simulate_*.json"))])
def test_kept_results_are_of_policies_that_there_are_and_their_commands_compose(name):
    found = json.loads((RESULTS / f"{name}.json").read_text())
    assert set(found["summary"]) <= set(POLICIES)
    overrides = shlex.split(found["command"].replace("[POLICY]", "[srtf]"))
    assert overrides[:3] == ["python", "-m", "recipes.simulate"]
    with initialize_config_dir(str(CONF), version_base="1.3"):
        assert compose("simulate", overrides[3:])


def test_measured_costs_are_the_default_and_published_ones_that_of_compatibility():
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = OmegaConf.to_container(compose("simulate"))
    measured = json.loads((RESULTS / "rescale_cpu.json").read_text())
    pause = measured["ways"]["relaunch"]["all"]["paused_s"]["median"]
    assert set(config["costs"].values()) == {None}
    assert set(vars(Costs()).values()) == {round(pause, 1)}
    assert PUBLISHED_RESCALE_S == 20.0


def test_errors_are_one_clear_line(simulate, tmp_path):
    trace = tmp_path / "t.csv"
    trace.write_text(HEAD + "a,5,resnet50,-4,64,2,0,v100\n")
    status, printed = simulate("trace=csv", f"trace.path={trace}")
    assert status == 2
    assert "line 2: `max_parallelism=-4`" in printed
    assert "Traceback" not in printed
    status, printed = simulate("trace=csv")
    assert status == 2
    assert "trace.path=VALUE" in printed
