"""What a checkpoint may be resumed as: the table of what is refused, warned of and allowed."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
from torch.utils.data import DataLoader, IterableDataset, SequentialSampler

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale import checkpoint as ckpt
from lightning_easyscale.checkpoint import CheckpointError
from lightning_easyscale.data.position import DataStateError

from .folders import contents
from .launch.job import Classifier, Points, SaveAt, loader, make_trainer

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:.*os.fork.*:DeprecationWarning"),
]


class Stream(IterableDataset):
    def __iter__(self) -> Iterator[Any]:
        return iter([Points()[i] for i in range(16)])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint inside the first epoch of two ESTs."""
    return save(tmp_path_factory.mktemp("saved"), loader())


def save(root: Path, data: Any, **options: Any) -> Path:
    path = root / "x.ckpt"
    pl.seed_everything(5, verbose=False)
    callbacks = [SaveAt(path, options.pop("batches", 2))]
    make_trainer(root, callbacks=callbacks, max_epochs=1, **options).fit(Classifier(), data)
    return path


def altered(path: Path, target: Path, change: Callable[[dict[str, Any]], Any]) -> Path:
    """A copy that a machine or version unlike this one might have written."""
    checkpoint = ckpt.load(path)
    change(checkpoint[ckpt.KEY])
    ckpt.seal(checkpoint)
    ckpt.save(checkpoint, target)
    return target


def of(**strategy: Any) -> Callable[[], Any]:
    return lambda: EasyScaleStrategy(**{"num_ests": 2, **strategy})


class Backwards(SequentialSampler):
    start = -1

    def __iter__(self) -> Iterator[int]:
        return iter([i % len(self.data_source) for i in range(self.start, self.start - len(self.data_source), -1)])


RESUMED: dict[str, tuple[dict[str, Any], type[BaseException], str]] = {
    "another N": (
        {"strategy": of(num_ests=3)},
        CheckpointError,
        r"trained with `num_ests=2`, this job has `num_ests=3`. HINT: .* resume with the same, or start .*weights",
    ),
    "another level": (
        {"strategy": of(determinism="D0")},
        CheckpointError,
        r"trained with `level='D1'`, this job has `level='D0'`. HINT: resume at the same level, or start a new job",
    ),
    "another order": (
        {"strategy": of(reduction="tree")},
        CheckpointError,
        r"trained with `reduction='ddp'`, this job has `reduction='tree'`. HINT: pass `reduction='ddp'`",
    ),
    "other threads": (
        {"strategy": of(threads_per_est=7)},
        CheckpointError,
        r"`threads_per_est=7`. HINT: thread counts change bits: pass `threads_per_est=\d+`",
    ),
    "another pool": (
        {"change": lambda e: e["job"].update(pool=["p100", "v100"])},
        CheckpointError,
        r"trained with `pool=\['p100', 'v100'\]`, .* HINT: .* pass `pool=\['p100', 'v100'\]`",
    ),
    "another seed": (
        {"seed": 6},
        CheckpointError,
        r"trained with seed 5, this run has 6: .* HINT: `seed_everything\(5\)`",
    ),
    "another torch": (
        {"change": lambda e: e["fingerprint"].update(torch="1.0")},
        CheckpointError,
        r"`torch` was '1.0' and is '.*', and level D1 promises equal bits. HINT: .* pass `allow=\['torch'\]`",
    ),
    "another lightning": (
        {"change": lambda e: e["fingerprint"].update(lightning="2.0")},
        CheckpointError,
        r"`lightning` was '2.0' and .* `allow=\['lightning'\]`",
    ),
    "another CUDA": (
        {"change": lambda e: e["fingerprint"].update(cuda="99.0")},
        CheckpointError,
        r"`cuda` was '99.0' and is",
    ),
    "another arithmetic": (
        {"change": lambda e: e["fingerprint"].update(format=0)},
        CheckpointError,
        r"`format` was 0 and is 1",
    ),
    "a newer format": (
        {"change": lambda e: e.update(format=99)},
        CheckpointError,
        r"has format 99, this version reads 1. HINT: resume with the version that wrote it",
    ),
    "fewer samples": (
        {"data": lambda: loader(40)},
        DataStateError,
        r"samples was 48 and is 40. HINT: .* the same data",
    ),
    "another batch size": (
        {"data": lambda: loader(batch_size=8)},
        DataStateError,
        r"batch_size was 4 and is 8.* HINT: resume with the same data",
    ),
    "another sampler": (
        {"data": lambda: loader(shuffle=False, sampler=Backwards(Points())), "use_distributed_sampler": False},
        DataStateError,
        r"sampler was 'DistributedSampler' and is 'Backwards'",
    ),
    "two loaders": (
        {"data": lambda: [loader(), loader()]},
        DataStateError,
        r"trained with 1 training loaders, this run has 2. HINT: ",
    ),
    "workers": ({"data": lambda: loader(num_workers=1)}, DataStateError, r"num_workers was 0 and is 1"),
    "another dataset": (
        {"data": lambda: DataLoader(Stream(), batch_size=4)},
        DataStateError,
        r"dataset was 'Points' and is 'Stream'",
    ),
}


def attempt(path: Path, root: Path, case: dict[str, Any]) -> pl.Trainer:
    options = dict(case)
    change, seed = options.pop("change", None), options.pop("seed", 5)
    strategy, data = options.pop("strategy", of())(), options.pop("data", loader)()
    if change:
        path = altered(path, root / "altered.ckpt", change)
    before = contents(path.parent)
    pl.seed_everything(seed, verbose=False)
    trainer = make_trainer(root, strategy=strategy, max_epochs=1, **options)
    try:
        trainer.fit(Classifier(), data, ckpt_path=path)
    finally:
        assert contents(path.parent) == before, "something was written, changed or lost"
    return trainer


@pytest.mark.parametrize("name", RESUMED)
def test_another_job_does_not_resume_a_checkpoint(name: str, saved: Path, tmp_path: Path) -> None:
    case, error, message = RESUMED[name]
    with pytest.raises(error, match=re.compile(message, re.DOTALL)):
        attempt(saved, tmp_path, case)


def test_a_sampler_that_draws_another_order_is_found_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def data() -> Any:
        return loader(shuffle=False, sampler=Backwards(Points()))

    path = save(tmp_path / "saved", data(), use_distributed_sampler=False)
    attempt(path, tmp_path, {"data": data, "use_distributed_sampler": False})
    monkeypatch.setattr(Backwards, "start", -2)
    message = r"does not come in the order of the checkpoint: after 2 of 2 batches the samples drawn differ. HINT: "
    with pytest.raises(DataStateError, match=message):
        attempt(path, tmp_path, {"data": data, "use_distributed_sampler": False})


WARNED: dict[str, tuple[dict[str, Any], str]] = {
    "another device type": (
        {"change": lambda e: e["fingerprint"].update(device_types="v100")},
        r"`device_types` was 'v100' and is 'cpu': from here on the bits are no longer promised",
    ),
    "another CPU": ({"change": lambda e: e["fingerprint"].update(cpu="Z80")}, r"`cpu` was 'Z80' and is"),
    "another driver": ({"change": lambda e: e["fingerprint"].update(driver="1.2")}, r"`driver` was '1.2' and is"),
    "torch, allowed": (
        {"change": lambda e: e["fingerprint"].update(torch="1.0"), "strategy": of(allow=["torch"])},
        r"`torch` was '1.0' and is '.*', which `allow` accepts",
    ),
}


@pytest.mark.parametrize("name", WARNED)
def test_what_is_warned_of_is_recorded(name: str, saved: Path, tmp_path: Path) -> None:
    case, message = WARNED[name]
    later = tmp_path / "later" / "y.ckpt"
    with pytest.warns(UserWarning, match=message):
        trainer = attempt(saved, tmp_path, case)
    trainer.save_checkpoint(later)
    (event,) = ckpt.load(later)[ckpt.KEY]["history"]
    assert re.search(message, event["warnings"][0])


def test_under_d0_versions_are_warned_of(tmp_path: Path) -> None:
    path = save(tmp_path / "d0", loader(), strategy=of(determinism="D0")())
    change = {"change": lambda e: e["fingerprint"].update(torch="1.0"), "strategy": of(determinism="D0")}
    with pytest.warns(UserWarning, match="`torch` was '1.0'"):
        attempt(path, tmp_path, change)


def test_under_d2_the_pool_speaks_for_the_devices() -> None:
    job = ckpt.JobIdentity(num_ests=2, level="D1+D2", pool=("p100", "v100"), reduction="ddp", threads_per_est=1)
    entry = {
        "format": ckpt.FORMAT,
        "job": job.to_state(),
        "fingerprint": {"torch": "2", "cpu": "a", "cpu_capability": "x"},
    }
    assert ckpt.check_resumable(entry, job, {"torch": "2", "cpu": "b", "cpu_capability": "y"}) == []
    with pytest.raises(CheckpointError, match="`torch` was '2' and is '3'"):
        ckpt.check_resumable(entry, job, {"torch": "3", "cpu": "a", "cpu_capability": "x"})


@pytest.mark.parametrize("now", ["pinned", "portable 2"])
def test_under_d2_policy_and_format_never_change(now: str) -> None:
    job = ckpt.JobIdentity(2, "D1+D2", ("cpu", "h100"), "ddp", 1, kernels="portable 1")
    entry = {"format": ckpt.FORMAT, "job": job.to_state(), "fingerprint": {}}
    assert ckpt.check_resumable(entry, job, {}) == []
    with pytest.raises(
        CheckpointError, match=rf"`kernels='portable 1'`, this job has `kernels='{now}'`.* HINT: the policy"
    ):
        ckpt.check_resumable(entry, replace(job, kernels=now), {})


class Counted(Points):
    """Depends on how often it was asked, which nobody can know."""

    calls = 0

    def __getitem__(self, index: int) -> Any:
        self.calls += 1
        x, y = super().__getitem__(index)
        return x + self.calls, y


UNRESUMABLE: dict[str, tuple[Callable[[], Any], str]] = {
    "order left to chance": (
        lambda: loader(num_workers=2, in_order=False),
        r"inside an epoch: with `in_order=False` the order of its batches is not determined. HINT: resume from",
    ),
    "a hidden counter": (
        lambda: DataLoader(Counted(), batch_size=4, num_workers=1),
        r"the data depends on something that is not saved.* HINT: draw from `torch`",
    ),
}


@pytest.mark.parametrize("name", UNRESUMABLE)
def test_what_cannot_be_resumed_exactly_inside_an_epoch_is_refused(name: str, tmp_path: Path) -> None:
    data, message = UNRESUMABLE[name]
    path = save(tmp_path / "saved", data())
    with pytest.raises(DataStateError, match=message):
        attempt(path, tmp_path / "again", {"data": data})


def test_loader_workers_are_no_obstacle_between_epochs(tmp_path: Path) -> None:
    path = save(tmp_path, loader(num_workers=1), batches=6)
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(tmp_path)
    trainer.fit(Classifier(), loader(num_workers=1), ckpt_path=path)
    assert trainer.global_step == 12


def test_damaged_checkpoints_are_refused_and_kept(saved: Path, tmp_path: Path) -> None:
    path = tmp_path / "saved" / "torn.ckpt"
    path.parent.mkdir()
    path.write_bytes(saved.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match=r"torn.ckpt` is damaged .* HINT: resume from an older checkpoint"):
        attempt(path, tmp_path, {})


def test_the_job_itself_still_resumes(saved: Path, tmp_path: Path) -> None:
    assert attempt(saved, tmp_path, {}).global_step == 6


def test_a_new_job_starts_from_the_weights_only(saved: Path, tmp_path: Path) -> None:
    module = Classifier.load_from_checkpoint(saved)
    make_trainer(tmp_path, strategy=of(num_ests=3)()).fit(module, loader())
