"""The structural clone of a real `Trainer`, its module, data module and callbacks: it trains alone, and alike."""

import copy
import types
import weakref

import lightning.pytorch as pl
import pytest
import torch
import torchmetrics
from lightning.pytorch.callbacks import (
    EarlyStopping,
    LearningRateMonitor,
    ModelCheckpoint,
    RichProgressBar,
    StochasticWeightAveraging,
    Timer,
    TQDMProgressBar,
)
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_easyscale.runtime.clone import structural_clone

pytestmark = [
    pytest.mark.filterwarnings("ignore::UserWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


class Classifier(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))
        self.accuracy = torchmetrics.MetricCollection(
            {"acc": torchmetrics.Accuracy("multiclass", num_classes=2), "mean": torchmetrics.MeanMetric()}
        )
        self.losses = []
        self.net[0].register_forward_hook(lambda module, args, out: self.hooked.append(out.shape) or out)
        self.hooked = []
        self.me = weakref.ref(self)

    def training_step(self, batch, index):
        x, y = batch
        loss = nn.functional.cross_entropy(self.net(x), y)
        self.losses.append(loss.detach())
        self.log("loss", loss)
        return loss

    def validation_step(self, batch, index):
        x, y = batch
        out = self.net(x)
        self.accuracy["acc"].update(out, y)
        self.log("acc", self.accuracy["acc"])

    def configure_optimizers(self):
        opt = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1)]


class Data(pl.LightningDataModule):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(1 << 17, 4, generator=generator)
        self.y = (self.x.sum(1) > 0).long()

    def train_dataloader(self):
        return DataLoader(TensorDataset(self.x[:64], self.y[:64]), batch_size=8, shuffle=True)

    def val_dataloader(self):
        return DataLoader(TensorDataset(self.x[:16], self.y[:16]), batch_size=8)


class Keeper(pl.Callback):
    def __init__(self, module):
        self.module, self.shadow = module, copy.deepcopy(module.net)
        self.owners = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.owners.append(pl_module is self.module)


def make_trainer(path, callbacks=(), **kwargs):
    flags = {"max_epochs": 2, "enable_progress_bar": False, "enable_model_summary": False, "logger": False}
    return pl.Trainer(accelerator="cpu", default_root_dir=path, callbacks=list(callbacks), **{**flags, **kwargs})


def same(made, old):
    return all(torch.equal(a, b) for a, b in zip(made.state_dict().values(), old.state_dict().values(), strict=True))


def test_a_clone_trains_with_the_same_bits_and_leaves_the_original_alone(tmp_path):
    module, data = Classifier(), Data()
    callbacks = [Keeper(module), EarlyStopping("acc", mode="max", patience=9), Timer(), LearningRateMonitor()]
    trainer = make_trainer(tmp_path, callbacks, logger=CSVLogger(tmp_path))
    loggers = set(map(id, trainer.loggers))
    fit, args, kwargs = structural_clone(
        [trainer._fit_impl, (module,), {"datamodule": data}], share=lambda value: id(value) in loggers
    )
    made_module, made_data, made_trainer = args[0], kwargs["datamodule"], fit.__self__
    assert made_trainer.logger is trainer.logger
    assert made_data.x is data.x
    assert made_trainer.callbacks[0].module is made_module
    assert made_module.me() is made_module
    before = copy.deepcopy(module.state_dict())
    torch.manual_seed(7)
    made_trainer.fit(made_module, datamodule=made_data)
    assert trainer.global_step == 0
    assert (module.losses, module.hooked) == ([], [])
    assert module.accuracy["acc"].tp.sum() == 0
    for name, value in module.named_buffers():
        assert torch.equal(value, before.get(name, value))
    for (name, old), new in zip(module.named_parameters(), made_module.parameters(), strict=True):
        assert torch.equal(old, new), name
    assert not torch.equal(module.net[0].weight, before["net.0.weight"])
    assert made_trainer.callbacks[0].owners == [True] * 16
    assert len(made_module.losses) == 16

    stock = Classifier()
    stock.load_state_dict(before)
    torch.manual_seed(7)
    make_trainer(tmp_path, [Keeper(stock)]).fit(stock, datamodule=Data())
    assert torch.equal(torch.stack(stock.losses), torch.stack(made_module.losses))
    assert same(stock, made_module)


def test_clones_after_a_fit_continue_it(tmp_path):
    module, data = Classifier(), Data()
    trainer = make_trainer(
        tmp_path,
        [ModelCheckpoint(tmp_path, monitor="acc", mode="max"), StochasticWeightAveraging(1e-2, swa_epoch_start=1)],
        num_sanity_val_steps=1,
    )
    trainer.fit(module, datamodule=data)
    fit, args = structural_clone([trainer._fit_impl, (module,)], share=lambda value: False)
    made = fit.__self__
    assert args[0].trainer is made
    assert made.global_step == trainer.global_step
    assert made.checkpoint_callback.best_model_path == trainer.checkpoint_callback.best_model_path
    assert made.strategy.optimizers[0].param_groups[0]["params"][0] is next(args[0].parameters())
    start, runs = copy.deepcopy(module.state_dict()), []
    for again, own in ((made, args[0]), (trainer, module)):
        own.load_state_dict(start)
        own.losses.clear()
        again.fit_loop.max_epochs = 4
        torch.manual_seed(7)
        again.fit(own, datamodule=Data())
        runs.append((again.global_step, torch.stack(own.losses), copy.deepcopy(own.state_dict())))
    assert runs[0][0] == runs[1][0] > 16
    assert torch.equal(runs[0][1], runs[1][1])
    assert all(torch.equal(new, old) for new, old in zip(runs[0][2].values(), runs[1][2].values(), strict=True))


@pytest.mark.parametrize("bar", [RichProgressBar, TQDMProgressBar])
def test_progress_bars_clone_before_and_after_a_fit(tmp_path, bar):
    module = Classifier()
    trainer = make_trainer(tmp_path, [bar()], enable_progress_bar=True, max_epochs=1)
    structural_clone([trainer._fit_impl, (module,)], share=lambda value: False)
    trainer.fit(module, datamodule=Data())
    fit = structural_clone([trainer._fit_impl], share=lambda value: False)[0]
    assert type(fit.__self__.progress_bar_callback) is bar


def test_functions_assigned_on_the_module(tmp_path):
    module = Classifier()
    opt = torch.optim.SGD(module.parameters(), lr=0.1)
    module.configure_optimizers = lambda: opt
    module.training_step = types.MethodType(lambda self, batch, index: self.net(batch[0]).square().mean(), module)
    trainer = make_trainer(tmp_path, max_steps=3, limit_val_batches=0)
    fit, args = structural_clone([trainer._fit_impl, (module, Data().train_dataloader())], share=lambda value: False)
    fit.__self__.fit(*args)
    made_opt = fit.__self__.optimizers[0]
    assert made_opt is not opt
    assert made_opt.param_groups[0]["params"][0] is args[0].net[0].weight
    assert args[0].net[1].num_batches_tracked == 3
    assert module.net[1].num_batches_tracked == 0


def test_a_compiled_module_handed_to_the_trainer(tmp_path):
    class Quiet(Classifier):
        def training_step(self, batch, index):  # dynamo cannot trace `self.log` in torch 2.13, stock or not
            self.losses.append(index)
            return self.net(batch[0]).square().mean()

    module = Quiet()
    compiled = pl.utilities.compile.from_compiled(torch.compile(module, backend="eager"))
    trainer = make_trainer(tmp_path, max_steps=2, limit_val_batches=0)
    fit, args = structural_clone([trainer._fit_impl, (compiled, Data().train_dataloader())], share=lambda value: False)
    fit.__self__.fit(*args)
    assert len(args[0].losses) == 2
    assert module.losses == []
    assert module.net[1].num_batches_tracked == 0
