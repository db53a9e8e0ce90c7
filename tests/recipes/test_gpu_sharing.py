"""Fig. 10: configuration, cells that run out of memory, going on after a stop, and a run in small from end to end."""

import json

import pytest

pytest.importorskip("hydra")
from hydra import initialize
from rich.console import Console

from recipes import gpu_sharing
from recipes._bench_runs import SideFailedError, _Turns
from recipes._bench_worker import Side
from recipes._config import ConfigError
from recipes._sharing_figure import PUBLISHED_MIB, PUBLISHED_S, draw
from recipes._warm import WarmRun
from recipes.gpu_sharing import KINDS, GpuSharingConf, Sharing, check, lines


@pytest.fixture(autouse=True)
def hydra_configs():
    with initialize(version_base="1.3", config_path="../../conf"):
        yield


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"workloads": ["alexnet"]}, "`workloads` has 'alexnet'"),
        ({"kinds": ["mps"]}, "`kinds` has 'mps'"),
        ({"ks": [0, 1]}, r"`ks=\[0, 1\]`"),
        ({"ks": []}, r"`ks=\[\]`"),
        ({"size": "huge"}, "`size=huge`"),
        ({"blocks": 0}, "`blocks`, `mini_batches` and `warmup`"),
    ],
)
def test_what_cannot_be_measured_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        check(GpuSharingConf(**options))


def test_published_figures_say_what_the_paper_says():
    for published in (PUBLISHED_MIB, PUBLISHED_S):
        assert {name: len(kinds["packing"]) for name, kinds in published.items()} == {"resnet50": 7, "shufflenetv2": 1}
        assert {len(kinds["easyscale"]) for kinds in published.values()} == {16}
    steps = PUBLISHED_MIB["resnet50"]["packing"]
    assert [round(b - a) // 100 for a, b in zip(steps, steps[1:6], strict=False)] == [47, 48, 47, 48, 47]


class Device:
    """Stands for `interleave`: a device on which two packed workers are too many, and one does not fit beside ESTs."""

    def __init__(self):
        self.calls = []

    def __call__(self, sides, warm, *, timeout_s, device_memory):
        assert device_memory
        self.calls.append(tuple(sides))
        if (packing := sides.get("packing")) is not None:
            if packing.workers > 1:
                raise SideFailedError("packing", "CUDA out of memory", out_of_memory=True, warmed_up=False)
            if len(sides) > 1:
                raise SideFailedError("packing", "CUDA out of memory", out_of_memory=True, warmed_up=True)
        memory = {"rss": 0, "peak_rss": 0, "device": 2**30, "allocated": 2**29, "reserved": 2**29}
        blocks = [{"seconds": side.workers * s} for side in sides.values() for s in (9.0, 0.1, 0.3, 0.2)][:4]
        return {name: [memory, *blocks] for name in sides}


def test_kinds_of_ests_differ_in_what_their_names_say(tmp_path):
    sharing = Sharing(GpuSharingConf(workloads=["neumf"], size="small", accelerator="cpu"), tmp_path, None)
    options = {}
    for kind in KINDS:
        if kind.startswith("easyscale"):
            side = sharing._side("neumf", 2, kind)
            options[kind] = (side.overlaps, side.input_offload, side.offload)
    assert options == {
        "easyscale": ("auto", None, None),
        "easyscale_alone": (False, None, None),
        "easyscale_overlap": (True, None, None),
        "easyscale_inputs": ("auto", "host", None),
        "easyscale_host": ("auto", None, "host"),
        "easyscale_host_alone": (False, None, "host"),
    }


def test_cells_that_run_out_of_memory_say_so_and_stop_the_larger_ones(tmp_path, monkeypatch):
    device = Device()
    monkeypatch.setattr(gpu_sharing, "interleave", device)
    conf = GpuSharingConf(workloads=["neumf"], size="small", ks=[1, 2, 4], accelerator="cpu", blocks=3)
    sharing = Sharing(conf, tmp_path, None)
    for group in sharing.groups():
        sharing.measure(*group)
    others = tuple(kind for kind in KINDS if kind != "packing")
    # Beside the others, the others alone, it alone; then out of memory; then not tried.
    assert device.calls == [KINDS, others, ("packing",), KINDS, others, others]
    cells = {(cell["kind"], cell["k"]): cell for cell in sharing.cells}
    assert cells["packing", 1]["alone"]
    assert not cells["easyscale", 1]["alone"]
    assert (cells["easyscale", 2]["median"], cells["easyscale", 2]["min"]) == (0.2, 0.1)  # not the first block
    assert [cells["packing", k]["out_of_memory"] for k in (1, 2, 4)] == [False, True, True]
    assert [cells["packing", k].get("tried") for k in (2, 4)] == [True, False]
    assert "neumf k=4 packing: out of memory" in list(lines(sharing.report(), "neumf", 4))
    draw(tmp_path / "x.png", sharing.report())
    assert (tmp_path / "x.png").read_bytes()[:4] == b"\x89PNG"


def test_finished_cells_are_kept_and_only_equal_ones_are_used_again(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_sharing, "interleave", Device())
    options = {"workloads": ["neumf"], "size": "small", "accelerator": "cpu", "blocks": 3, "kinds": ["easyscale"]}
    first = Sharing(GpuSharingConf(ks=[1, 2], **options), tmp_path, None)
    first.measure(*next(first.groups()))
    again = Sharing(GpuSharingConf(ks=[1, 2], **options), tmp_path, None)
    assert list(again.groups()) == [("neumf", 2, ["easyscale"])]
    other = Sharing(GpuSharingConf(ks=[1], **{**options, "blocks": 4}), tmp_path, None)
    assert list(other.groups()) == [("neumf", 1, ["easyscale"])]


def test_a_side_without_memory_is_told_from_one_that_fails(tmp_path):
    for text, expected in (("torch.OutOfMemoryError: CUDA out of memory", True), ("ValueError: no", False)):
        side = Side("packing", "neumf", 2, 1, 1, 1, 1, 1, 1, "gpu", 1, "auto", str(tmp_path))
        turns = _Turns({"packing": side}, 0.0)
        turns._runs["packing"] = WarmRun("packing", tmp_path / "log", [2**22 + 1, 2**22 + 2])
        for rank, log in enumerate(("connection closed by peer", text)):
            (tmp_path / f"log.{rank}").write_text(log)
            (tmp_path / f"log.{rank}.status").write_text("1")
        with pytest.raises(SideFailedError) as failed:
            turns._ended("packing")
        assert failed.value.out_of_memory is expected


def test_a_small_run_from_end_to_end(tmp_path):
    conf = GpuSharingConf(
        **{"workloads": ["neumf"], "size": "small", "ks": [2], "blocks": 2, "mini_batches": 2, "warmup": 1},
        **{"accelerator": "cpu", "threads": 1},
    )
    gpu_sharing.measure(conf, tmp_path, Console())
    report = json.loads((tmp_path / "gpu_sharing.json").read_text())
    assert [cell["kind"] for cell in report["cells"]] == list(KINDS)
    for cell in report["cells"]:
        assert 0 < cell["min"] <= cell["median"] <= cell["max"]
        assert cell["device_mib"] > 0
    two, one = (next(c for c in report["cells"] if c["kind"] == kind) for kind in ("packing", "accumulate"))
    assert two["device_mib"] > 1.5 * one["device_mib"]  # two processes
    assert (tmp_path / "gpu_sharing.csv").read_text().count("\n") == len(KINDS) + 1
    assert list(Sharing(conf, tmp_path, None).groups()) == []
