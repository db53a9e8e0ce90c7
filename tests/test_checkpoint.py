"""Checkpoints: committed whole or not at all, readable by plain Lightning, resumed to the same bits."""

from __future__ import annotations

import errno
import os
import shutil
import zipfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale import checkpoint as ckpt
from lightning_easyscale.session import Session

from .launch.job import Classifier, SaveAt, loader, make_trainer, state_digest

pytestmark = [
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:Using `DistributedSampler` with the dataloaders"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]
N = 3
BATCHES = 4  # per EST and epoch: 48 samples, 3 ESTs, 4 per batch


@pytest.fixture(scope="module")
def full(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, list[str]]:
    """A run of two epochs that was not interrupted and saved after batch 3: the file, its last state, its losses."""
    root = tmp_path_factory.mktemp("full")
    path = root / "mid.ckpt"
    state, losses = run(root, callbacks=[SaveAt(path, 3)])
    return path, state, losses


def run(
    root: Path, *, resume: Path | None = None, num_ests: int = N, strategy: Any = None, fit: Any = None, **options: Any
) -> tuple[str, list[str]]:
    """One run of the small job; its last state and the lead's losses."""
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(root, strategy=strategy or EasyScaleStrategy(num_ests=num_ests), **options)
    module = Classifier()
    trainer.fit(module, *(fit or (loader(), loader(shuffle=False))), ckpt_path=resume)
    return state_digest(trainer), module.losses


def resumed(root: Path, path: Path, **options: Any) -> tuple[str, list[str]]:
    torch.manual_seed(99)
    return run(root, resume=path, **options)


# -- the file --------------------------------------------------------------------------------------------------------
def content() -> dict[str, Any]:
    checkpoint = {"state_dict": {"w": torch.arange(5000.0)}, "epoch": 3, ckpt.KEY: {"format": ckpt.FORMAT, "ests": {}}}
    ckpt.seal(checkpoint)
    return checkpoint


def fail(*_: Any, **__: Any) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


def half(checkpoint: Any, file: Any) -> None:
    file.write(b"PK half of it")
    raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("target", "fault", "error"),
    [
        ("tempfile.mkstemp", fail, OSError),
        ("torch.save", fail, OSError),
        ("torch.save", half, KeyboardInterrupt),
        ("os.fsync", fail, OSError),
        ("os.chmod", fail, OSError),
        ("os.replace", fail, OSError),
    ],
)
def test_a_fault_at_any_stage_of_the_commit_leaves_the_previous_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, target: str, fault: Any, error: type[BaseException]
) -> None:
    path = tmp_path / "last.ckpt"
    ckpt.save(content(), path)
    before = path.read_bytes()
    with monkeypatch.context() as patch:
        patch.setattr(target, fault)
        with pytest.raises(error):
            ckpt.save({**content(), "epoch": 4}, path)
    assert path.read_bytes() == before
    assert os.listdir(tmp_path) == ["last.ckpt"], "a temporary file stayed behind"
    assert ckpt.load(path)["epoch"] == 3


def test_a_commit_has_the_permissions_of_any_new_file(tmp_path: Path) -> None:
    ckpt.save(content(), tmp_path / "a.ckpt")
    (tmp_path / "b").touch()
    assert (tmp_path / "a.ckpt").stat().st_mode == (tmp_path / "b").stat().st_mode


def truncate(share: float) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def flip(share: float) -> Callable[[Path], None]:
    def damage(path: Path) -> None:
        raw = bytearray(path.read_bytes())
        raw[int(len(raw) * share)] ^= 0xFF
        path.write_bytes(raw)

    return damage


def flip_in_pickle(path: Path) -> None:
    raw = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as file:
        info = next(i for i in file.infolist() if i.filename.endswith("data.pkl"))
    for offset in range(20):
        raw[info.header_offset + 100 + 7 * offset] ^= 0x55
    path.write_bytes(raw)


def change_content(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    next(iter(checkpoint["state_dict"].values())).view(-1)[0] += 1
    torch.save(checkpoint, path)


def change_number(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    checkpoint["epoch"] += 1
    torch.save(checkpoint, path)


def drop_entry_field(path: Path) -> None:
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint[ckpt.KEY]["ests"]
    torch.save(checkpoint, path)


@pytest.mark.parametrize(
    "damage",
    [
        lambda p: p.write_bytes(b""),
        lambda p: p.write_bytes(b"not a checkpoint" * 100),
        lambda p: p.write_bytes(bytes(range(256)) * 16),
        truncate(0.1),
        truncate(0.5),
        truncate(0.99),
        flip(0.5),
        flip_in_pickle,
        change_content,
        change_number,
        drop_entry_field,
    ],
)
@pytest.mark.parametrize("weights_only", [None, True, False])
def test_a_damaged_file_is_one_clear_error(tmp_path: Path, damage: Any, weights_only: bool | None) -> None:
    path = tmp_path / "x.ckpt"
    ckpt.save(content(), path)
    damage(path)
    with pytest.raises(ckpt.CheckpointError, match=r"x\.ckpt` (is damaged|is not what was written).*HINT: "):
        ckpt.load(path, weights_only=weights_only)


class Unsafe:
    pass


def test_an_intact_file_with_foreign_objects_is_not_called_damaged(tmp_path: Path) -> None:
    ckpt.save({"a": Unsafe()}, tmp_path / "x.ckpt")
    with pytest.raises(Exception, match="Weights only load failed"):
        ckpt.load(tmp_path / "x.ckpt", weights_only=True)
    with pytest.raises(FileNotFoundError):
        ckpt.load(tmp_path / "none.ckpt")


# -- a normal Lightning checkpoint -----------------------------------------------------------------------------------
def test_it_loads_with_weights_only_and_holds_every_est(full: Any) -> None:
    checkpoint = torch.load(full[0], weights_only=True)
    entry = checkpoint[ckpt.KEY]
    assert sorted(entry["ests"]) == list(range(N))
    assert entry["job"]["num_ests"] == N
    assert entry["seed"] == 5
    means = [entry["ests"][r]["buffers"]["net.1.running_mean"] for r in range(N)]
    assert not torch.equal(means[0], means[1])
    assert "callbacks" in checkpoint
    assert "pytorch-lightning_version" in checkpoint


def test_load_from_checkpoint(full: Any) -> None:
    module = Classifier.load_from_checkpoint(full[0])
    saved = torch.load(full[0], weights_only=True)["state_dict"]
    assert all(torch.equal(value, saved[name]) for name, value in module.state_dict().items())


@pytest.mark.filterwarnings("ignore:You're resuming from a checkpoint that ended before")
def test_a_plain_single_device_trainer_resumes_it(full: Any, tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path, strategy="auto")
    module = Classifier()
    trainer.fit(module, loader(), ckpt_path=full[0])
    assert trainer.current_epoch == 2
    assert trainer.global_step > 3


def test_a_checkpoint_of_stock_lightning_can_be_started_from(tmp_path: Path) -> None:
    stock = make_trainer(tmp_path, strategy="auto", max_epochs=1)
    stock.fit(Classifier(), loader())
    stock.save_checkpoint(tmp_path / "stock.ckpt")
    trainer = make_trainer(tmp_path)
    with pytest.warns(UserWarning, match="was not written under EasyScale"):
        trainer.fit(Classifier(), loader(), ckpt_path=tmp_path / "stock.ckpt")
    assert trainer.current_epoch == 2


# -- resume ----------------------------------------------------------------------------------------------------------
def test_resume_inside_an_epoch_gives_the_bits_of_the_run_that_went_on(full: Any, tmp_path: Path) -> None:
    path, state, losses = full
    again, rest = resumed(tmp_path, path)
    assert rest == losses[3:]
    assert again == state


def test_what_was_not_restored_would_show(full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_easyscale.rng import Generators

    monkeypatch.setattr(Generators, "load_state_dict", lambda *_: None)
    _, rest = resumed(tmp_path, full[0])
    assert rest != full[2][3:]


@pytest.mark.parametrize("at", range(1, 2 * BATCHES))
@pytest.mark.parametrize(
    "options",
    [{"accumulate_grad_batches": 3}, {"val_check_interval": 2}, {"check_val_every_n_epoch": 2}],
    ids=["accumulating", "validating every 2", "validating every 2 epochs"],
)
def test_resume_after_any_batch(tmp_path: Path, at: int, options: dict[str, Any]) -> None:
    path = tmp_path / "x.ckpt"
    state, losses = run(tmp_path, num_ests=2 if at % 2 else 3, callbacks=[SaveAt(path, at)], **options)
    again, rest = resumed(tmp_path, path, num_ests=2 if at % 2 else 3, **options)
    assert rest == losses[at:]
    assert again == state


def test_modelcheckpoints_resume_exactly(tmp_path: Path) -> None:
    def keep(folder: str) -> ModelCheckpoint:
        return ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_top_k=-1, save_last=True)

    state, losses = run(tmp_path, callbacks=[keep("a")], enable_checkpointing=True)
    files = sorted(p.name for p in (tmp_path / "a").iterdir())
    assert files == ["epoch=0-step=3.ckpt", "epoch=1-step=6.ckpt", "last.ckpt"]
    # Lightning 2.5 saves the last one at the end of an epoch, too.
    last = "last.ckpt" if torch.load(tmp_path / "a" / "last.ckpt")["global_step"] == 6 else "epoch=1-step=6.ckpt"
    for name, at in (("epoch=0-step=3.ckpt", 3), (last, 6)):
        again, rest = resumed(tmp_path, tmp_path / "a" / name, callbacks=[keep("b")], enable_checkpointing=True)
        assert (again, rest) == (state, losses[at:])
        shutil.rmtree(tmp_path / "b")


def test_weights_only_checkpoints_are_plain(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "w", save_weights_only=True)
    run(tmp_path, callbacks=[keep], enable_checkpointing=True)
    assert ckpt.KEY not in torch.load(keep.best_model_path, weights_only=True)
    assert isinstance(Classifier.load_from_checkpoint(keep.best_model_path), Classifier)


def test_async_checkpoints_are_committed_and_verified_too(full: Any, tmp_path: Path) -> None:
    path = tmp_path / "async.ckpt"
    state, losses = run(tmp_path, callbacks=[SaveAt(path, 3)], plugins=[AsyncCheckpointIO()])
    assert (state, losses) == full[1:]
    assert ckpt.content_digest(torch.load(path, weights_only=True)) == ckpt.content_digest(
        torch.load(full[0], weights_only=True)
    )
    again, rest = resumed(tmp_path, path)
    assert (again, rest) == (state, losses[3:])


def test_saving_after_the_run_keeps_each_ests_own_state(tmp_path: Path) -> None:
    """From the user's script, between two calls: as if a callback had saved at the end."""

    class SaveAtEnd(Callback):
        def on_fit_end(self, trainer: pl.Trainer, *_: Any) -> None:
            trainer.save_checkpoint(tmp_path / "inside.ckpt")

    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(tmp_path, strategy=EasyScaleStrategy(num_ests=N), callbacks=[SaveAtEnd()])
    trainer.fit(Classifier(), loader())
    torch.rand(5)
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    inside, after = (ckpt.load(tmp_path / f"{name}.ckpt")[ckpt.KEY]["ests"] for name in ("inside", "after"))
    for rank in range(N):
        same = torch.equal(inside[rank]["generators"]["torch"], after[rank]["generators"]["torch"])
        assert same == (rank > 0), "the script has drawn from the lead's generator and from no other"
        assert torch.equal(inside[rank]["buffers"]["net.1.running_mean"], after[rank]["buffers"]["net.1.running_mean"])


def test_a_run_extended_from_its_last_checkpoint_equals_the_longer_run(tmp_path: Path) -> None:
    pl.seed_everything(5, verbose=False)
    trainer = make_trainer(tmp_path, strategy=EasyScaleStrategy(num_ests=N), max_epochs=1)
    trainer.fit(Classifier(), loader(), loader(shuffle=False))
    trainer.save_checkpoint(tmp_path / "after.ckpt")
    long, losses = run(tmp_path)
    again, rest = resumed(tmp_path, tmp_path / "after.ckpt")
    assert rest == losses[BATCHES:]
    assert again == long


def test_saving_without_a_fit(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path)
    module = Classifier()
    trainer.validate(module, loader(shuffle=False), verbose=False)
    trainer.save_checkpoint(tmp_path / "x.ckpt")
    assert ckpt.load(tmp_path / "x.ckpt")[ckpt.KEY]["buckets"] is None
    assert isinstance(Classifier.load_from_checkpoint(tmp_path / "x.ckpt"), Classifier)


def test_the_history_tells_each_resume_and_what_differed(full: Any, tmp_path: Path) -> None:
    resumed(tmp_path, full[0], callbacks=[SaveAt(tmp_path / "second.ckpt", 2)])
    history = ckpt.load(tmp_path / "second.ckpt")[ckpt.KEY]["history"]
    assert history == [{"placement": [N], "warnings": []}]


def test_a_drawn_seed_yields_to_the_checkpoints(full: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    trainer = make_trainer(tmp_path, strategy=EasyScaleStrategy(num_ests=N))
    module = Classifier()
    trainer.fit(module, loader(), loader(shuffle=False), ckpt_path=full[0])
    assert module.losses == full[2][3:]
    assert os.environ["PL_GLOBAL_SEED"] == "5"


def test_a_drawn_seed_reproduces_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("PL_GLOBAL_SEED", raising=False)
    first = Classifier()
    make_trainer(tmp_path).fit(first, loader())
    drawn = os.environ["PL_GLOBAL_SEED"]
    monkeypatch.delenv("EASYSCALE_DRAWN_SEED")
    monkeypatch.setenv("PL_GLOBAL_SEED", drawn)
    second = Classifier()
    make_trainer(tmp_path).fit(second, loader())
    assert first.losses == second.losses


def test_between_runs_the_process_speaks_for_itself(tmp_path: Path) -> None:
    run(tmp_path)
    assert not torch.distributed.is_initialized()
    stock = make_trainer(tmp_path, strategy="auto", max_epochs=1)
    stock.fit(Classifier(), loader(), loader(shuffle=False))
    assert stock.world_size == 1


class OnADevice(torch.Tensor):
    """Stands for a device's tensor, as far as it says whether it was fetched."""

    def cpu(self) -> torch.Tensor:  # type: ignore[override]
        return torch.ones(2)


@pytest.mark.parametrize("executors", [1, 2])
def test_states_go_to_other_executors_in_host_memory(executors: int) -> None:
    """After a run as well: pickled tensors of a device would be made again on the other's device of that number."""
    sent: list[Any] = []
    peers = SimpleNamespace(size=executors, all_gather_object=lambda own: sent.append(own) or [own, {1: "theirs"}])
    session: Any = SimpleNamespace(running=False, ests=range(1), peers=peers)
    gathered = Session.gather(session, 0, lambda rank: {"buffers": {"x": OnADevice()}}, "save")
    assert type(sent[0][0]["buffers"]["x"]) is (torch.Tensor if executors > 1 else OnADevice)
    assert list(gathered) == [0, 1]
