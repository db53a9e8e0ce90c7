"""The record holds what `training_step` returned, in every rank, and goes on over a resume."""

import lightning.pytorch as pl
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader, TensorDataset

from lightning_easyscale.callbacks import DeterminismCallback, RunRecord
from lightning_easyscale.compare import compare
from lightning_easyscale.record import Record, TensorBits

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore:.*isinstance.treespec, LeafSpec.*"),
]


class Model(pl.LightningModule):
    """Keeps its own list of what each training step returned."""

    def __init__(self, optimizer="adam", manual=False, returns="dict"):
        super().__init__()
        torch.manual_seed(1)
        self.net = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.BatchNorm1d(4), torch.nn.Linear(4, 1))
        self.automatic_optimization = not manual
        self.optimizer, self.returns, self.returned = optimizer, returns, []

    def training_step(self, batch, batch_idx):
        loss = self.net(batch[0]).square().mean()
        self.returned.append(loss.detach().clone())
        if not self.automatic_optimization:
            optimizer = self.optimizers()
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()
        self.log("named", loss, on_step=True, on_epoch=True)
        return {"dict": {"loss": loss, "twice": 2 * loss}, "tensor": loss, "none": None}[self.returns]

    def validation_step(self, batch, batch_idx):
        self.log("val_mean", self.net(batch[0]).mean())

    def configure_optimizers(self):
        return {"adam": torch.optim.Adam, "lbfgs": lambda p: torch.optim.LBFGS(p, max_iter=3)}[self.optimizer](
            self.net.parameters()
        )


class _FailAt(pl.Callback):
    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx == 3:
            raise RuntimeError("injected")


def fit(directory, model, *, batches=6, epochs=1, ckpt_path=None, callbacks=(), validate=False, record=(), **trainer):
    pl.seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(4 * batches, 4)), batch_size=4)
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[RunRecord(directory, **dict(record)), *callbacks],
        **{"max_epochs": epochs, "enable_checkpointing": False, **trainer},
    )
    trainer.fit(model, data, data if validate else None, ckpt_path=ckpt_path)
    return trainer


def losses(directory, name="loss"):
    return [entry.tensors[name] for entry in Record.load(directory).ests[0].steps.values()]


@pytest.mark.parametrize("returns", ["dict", "tensor"])
def test_loss_is_recorded_as_returned_not_divided_by_accumulation(tmp_path, returns):
    model = Model(returns=returns)
    fit(tmp_path, model, accumulate_grad_batches=3)
    assert losses(tmp_path) == [TensorBits.of(value) for value in model.returned]
    assert [e.step for e in Record.load(tmp_path).ests[0].steps.values()] == [0, 0, 0, 1, 1, 1]
    if returns == "dict":
        assert losses(tmp_path, "twice") == [TensorBits.of(2 * value) for value in model.returned]


def test_every_closure_call_is_recorded(tmp_path):
    model = Model(optimizer="lbfgs", returns="tensor")
    fit(tmp_path, model, batches=2)
    entries = Record.load(tmp_path).ests[0].steps.values()
    recorded = [bits for entry in entries for bits in entry.tensors.values()]
    assert recorded == [TensorBits.of(value) for value in model.returned]
    assert next(iter(entries)).tensors.keys() >= {"loss", "loss@1", "loss@2"}


def test_manual_optimization_records_what_it_returns_or_else_what_it_logs(tmp_path):
    for returns, name in (("dict", "loss"), ("none", "named")):
        model = Model(manual=True, returns=returns)
        fit(tmp_path / returns, model)
        assert losses(tmp_path / returns, name) == [TensorBits.of(value) for value in model.returned]


def test_module_is_left_as_it_was(tmp_path):
    model = Model()
    fit(tmp_path, model)
    assert "training_step" not in vars(model)


def test_digests_at_chosen_steps_and_at_the_end(tmp_path):
    fit(tmp_path, Model(), record={"digest_every_n_steps": 4, "digest_at": (1,)})
    digests = Record.load(tmp_path).ests[0].digests
    assert list(digests) == [1, 4, 6]
    assert set(digests[1]) == {"parameters", "buffers", "optimizer"}
    assert len({digests[step]["parameters"].total for step in digests}) == 3


def test_metrics_of_epochs_and_validations(tmp_path):
    fit(tmp_path, Model(), epochs=2, validate=True)
    metrics = Record.load(tmp_path).ests[0].metrics
    assert [(key, sorted(entry.tensors)) for key, entry in metrics.items()] == [
        ((6, "validation"), ["val_mean"]),
        ((6, "train"), ["named", "named_epoch"]),
        ((12, "validation"), ["val_mean"]),
        ((12, "train"), ["named", "named_epoch"]),
    ]


def test_resumed_run_continues_the_record(tmp_path):
    fit(tmp_path / "whole", Model(), epochs=2)
    save = ModelCheckpoint(tmp_path, filename="a")
    fit(tmp_path / "parts", Model(), epochs=1, callbacks=[save], enable_checkpointing=True)
    with pytest.raises(RuntimeError, match="injected"):
        fit(tmp_path / "parts", Model(), epochs=2, ckpt_path=tmp_path / "a.ckpt", callbacks=[_FailAt()])
    assert compare(tmp_path / "whole", tmp_path / "parts", common=True) is None
    fit(tmp_path / "parts", Model(), epochs=2, ckpt_path=tmp_path / "a.ckpt")  # goes back from step 9 to step 6
    assert compare(tmp_path / "whole", tmp_path / "parts") is None
    assert list(Record.load(tmp_path / "parts").ests[0].steps) == list(range(12))


def test_second_fit_of_one_trainer_continues_and_another_trainer_starts_anew(tmp_path):
    model = Model()
    trainer = fit(tmp_path, model)
    trainer.fit_loop.max_epochs = 2
    trainer.fit(model, DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4))
    assert list(Record.load(tmp_path).ests[0].steps) == list(range(12))
    again = pl.Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, callbacks=trainer.callbacks[:1]
    )
    again.fit(model, DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4))
    assert list(Record.load(tmp_path).ests[0].steps) == [0]


def test_failed_run_leaves_its_steps_and_the_cause(tmp_path):
    model = Model()
    with pytest.raises(RuntimeError, match="injected"):
        fit(tmp_path, model, callbacks=[_FailAt()])
    est = Record.load(tmp_path).ests[0]
    assert list(est.steps) == [0, 1, 2]
    assert est.events[-1]["data"] == {"type": "RuntimeError", "message": "injected"}
    assert "training_step" not in vars(model)


def test_start_event_tells_placement_and_fingerprint(tmp_path):
    fit(tmp_path, Model())
    start = Record.load(tmp_path).ests[0].events[0]
    assert start["data"]["placement"] == {"ests_per_executor": [1], "executor": 0, "host_device_types": []}
    assert start["data"]["fingerprint"]["torch"] == torch.__version__


def test_recording_changes_no_bit(tmp_path):
    recorded, plain = Model(), Model()
    fit(tmp_path, recorded, record={"digest_every_n_steps": 1})
    pl.seed_everything(0, verbose=False)
    data = DataLoader(TensorDataset(torch.randn(24, 4)), batch_size=4)
    pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False).fit(plain, data)
    assert torch.equal(torch.stack(recorded.returned), torch.stack(plain.returned))


def test_determinism_callback_applies_flags_and_threads_while_training(tmp_path):
    class Look(pl.Callback):
        def on_train_batch_start(self, *args):
            seen.append((torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()))

    seen, threads = [], torch.get_num_threads()
    fit(tmp_path, Model(), callbacks=[DeterminismCallback("d1", threads=threads + 1), Look()], max_steps=1)
    assert seen == [(True, threads + 1)]
    assert (torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()) == (False, threads)
    with pytest.raises(RuntimeError, match="injected"):
        fit(tmp_path, Model(), callbacks=[DeterminismCallback("d1"), _FailAt()])
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: RunRecord("x", digest_every_n_steps=0), "`digest_every_n_steps=0`"),
        (lambda: RunRecord("x", flush_every_n_steps=-1), "`flush_every_n_steps=-1`"),
        (lambda: DeterminismCallback("D1+D2"), "needs `pool`"),
        (lambda: DeterminismCallback("D1", pool=["v100"]), "`pool` has no meaning"),
        (lambda: DeterminismCallback("D7"), "D7"),
        (lambda: DeterminismCallback("D1", threads=0), "`threads=0`"),
    ],
)
def test_unusable_arguments_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
