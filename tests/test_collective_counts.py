"""Nothing hides: rendezvous, switches and physical collectives per training step, counted."""

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easyscale import EasyScaleStrategy
from lightning_easyscale.elastic import cadence
from lightning_easyscale.reduction.collector import ESTDataParallel

STEPS = 6


class Net(pl.LightningModule):
    def __init__(self, log=False):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.1), nn.Linear(8, 3))
        self.log_loss = log

    def training_step(self, batch, batch_idx):
        loss = nn.functional.cross_entropy(self.net(batch[0]), batch[1])
        if self.log_loss:
            self.log("loss", loss, on_step=False, on_epoch=True, sync_dist=True)
            self.log("norm", batch[0].norm())
        return loss

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Counts(pl.Callback):
    """The lead's counters at the start of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        executor = trainer.strategy.session.executor
        self.seen.append((executor.switches, executor.meetings, executor.peers.physical_collectives))

    def per_step(self):
        return {tuple(b - a for a, b in zip(one, two)) for one, two in zip(self.seen[1:], self.seen[2:])}  # noqa: B905


def train(
    module,
    *,
    num_ests,
    accelerator="cpu",
    reduction="ddp",
    callbacks=(),
    elastic_dir=None,
    snapshot_every_n_steps=None,
    **arguments,
):
    counts = Counts()
    data = TensorDataset(torch.randn(4 * num_ests * STEPS, 4), torch.randint(0, 3, (4 * num_ests * STEPS,)))
    trainer = pl.Trainer(
        strategy=EasyScaleStrategy(
            num_ests=num_ests,
            reduction=reduction,
            elastic_dir=elastic_dir,
            snapshot_every_n_steps=snapshot_every_n_steps,
        ),
        accelerator=accelerator,
        devices=1,
        max_steps=STEPS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[counts, *callbacks],
        **arguments,
    )
    trainer.fit(module, DataLoader(data, batch_size=4))
    return counts


@pytest.mark.parametrize("reduction", ["ddp", "tree"])
@pytest.mark.parametrize("log", [False, True])
@pytest.mark.parametrize("num_ests", [2, 3])
def test_one_rendezvous_and_n_switches_per_step(num_ests, log, reduction):
    assert train(Net(log), num_ests=num_ests, reduction=reduction).per_step() == {(num_ests, 1, 0)}


def test_listening_to_stop_signals_adds_no_rendezvous(tmp_path):
    assert train(Net(), num_ests=2, elastic_dir=tmp_path).per_step() == {(2, 1, 0)}


def test_automatic_snapshots_meet_only_where_they_are_taken(tmp_path, monkeypatch):
    monkeypatch.setattr(cadence, "FIRST_STEPS", 1)
    counts = train(Net(), num_ests=2, elastic_dir=tmp_path, snapshot_every_n_steps="auto")
    per_step = [tuple(b - a for a, b in zip(one, two)) for one, two in zip(counts.seen[1:], counts.seen[2:])]  # noqa: B905
    assert sorted(per_step) == [(2, 1, 0)] * (len(per_step) - 1) + [(4, 2, 0)]


def test_clipping_and_a_schedule_add_no_rendezvous():
    class Scheduled(Net):
        def configure_optimizers(self):
            optimizer = torch.optim.AdamW(self.parameters())
            schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    assert train(Scheduled(True), num_ests=2, gradient_clip_val=0.1).per_step() == {(2, 1, 0)}


def test_accumulation_meets_only_where_it_steps():
    counts = train(Net(), num_ests=2, accumulate_grad_batches=2)
    meetings = [two[1] - one[1] for one, two in zip(counts.seen[1:], counts.seen[2:])]  # noqa: B905
    assert set(meetings) == {0, 1}
    assert abs(2 * sum(meetings) - len(meetings)) <= 1


@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_python_hears_of_one_gradient_of_a_bucket(monkeypatch, reduction):
    heard = []
    told = ESTDataParallel._gradient_ready
    monkeypatch.setattr(
        ESTDataParallel, "_gradient_ready", lambda self, index: heard.append(index) or told(self, index)
    )
    train(Net(), num_ests=2, reduction=reduction)
    parameters = 6
    assert len(heard) == 2 * (parameters + (STEPS - 1))


def test_hooks_that_may_look_at_parameters_cost_one_more():
    class Looks(Net):
        def on_before_optimizer_step(self, optimizer):
            self.net[0].weight.sum()

    assert train(Looks(), num_ests=2).per_step() == {(4, 2, 0)}


def test_every_est_sees_the_reduced_gradients_after_the_step():
    class Gradients(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            grads = [p.grad.clone() for p in pl_module.parameters()]
            seen.setdefault(batch_idx, {})[trainer.global_rank] = grads

    seen = {}
    Gradients.__deepcopy__ = lambda self, memo: self  # one record for all ESTs
    train(Net(), num_ests=3, callbacks=[Gradients()], gradient_clip_val=0.01)
    for per_rank in seen.values():
        assert set(per_rank) == {0, 1, 2}
        for rank in 1, 2:
            assert all(map(torch.equal, per_rank[0], per_rank[rank]))


def test_gradients_that_nobody_drops_accumulate_as_in_stock_ddp():
    class Partly(Net):
        """The last layer is not optimized, so its gradients are never dropped."""

        def configure_optimizers(self):
            return torch.optim.SGD(self.net[:2].parameters(), lr=0.1)

    def last_gradient(private):
        torch.manual_seed(0)
        module = Partly()
        if private:
            module.on_before_zero_grad = lambda optimizer: None  # user code that may look: every EST gets a copy
        torch.manual_seed(1)
        train(module, num_ests=3)
        return module.net[4].weight.grad

    assert torch.equal(last_gradient(private=False), last_gradient(private=True))


@pytest.mark.gpu
@pytest.mark.parametrize("snapshots", [False, True])
@pytest.mark.parametrize("reduction", ["ddp", "tree"])
def test_a_step_waits_for_no_device(reduction, snapshots, tmp_path, monkeypatch):
    monkeypatch.setattr(cadence, "FIRST_STEPS", 1)

    class Watch(pl.Callback):
        """Forbids synchronisation from the third step to the end of the epoch, for whichever EST runs."""

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 2:
                torch.cuda.set_sync_debug_mode("error")

        def on_train_epoch_end(self, trainer, pl_module):
            torch.cuda.set_sync_debug_mode("default")

    module = Net()
    try:
        more = {"elastic_dir": tmp_path, "snapshot_every_n_steps": "auto"} if snapshots else {}
        train(module, num_ests=2, accelerator="gpu", reduction=reduction, callbacks=[Watch()], **more)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert module.device.type == "cpu"
