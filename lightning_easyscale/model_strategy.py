"""What an EST does with its module, its training steps and its optimizers.

Stock `DDPStrategy` with three differences: the parameters of an executor's ESTs share one storage, gradients are
reduced by the session in the job's order, and only the lead EST's optimizers step. Who runs where is `strategy`'s.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.nn import Module

from . import _lightning as pl
from ._lightning_steps import ForwardRedirection
from .compatibility import DriftCheck
from .optimization import (
    LeadState,
    ShownGradients,
    clip_where_gradients_are,
    follow_lead,
    plain_steps,
    reads_before_step,
    reads_gradients,
)
from .progress import hide_job, show_job
from .reduction.collector import ESTDataParallel
from .runtime.overlap import Overlap
from .runtime.writes import has_compiled

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

    from .checkpointing import Checkpointing
    from .devices import DeviceType
    from .session import Session


_TRANSFER_HOOKS = ("transfer_batch_to_device", "on_after_batch_transfer")


class ModelStrategy(DDPStrategy):
    """The part of `EasyScaleStrategy` that handles the model and its optimizers.

    Args:
        gradient_offload: see `EasyScaleStrategy`.
        input_offload: see `EasyScaleStrategy`.
        overlap_backward: see `EasyScaleStrategy`.
        process_group_backend: see `EasyScaleStrategy`.
        timeout: see there.
        start_method: see there.
        ddp_options: keyword arguments of `torch.nn.parallel.DistributedDataParallel`.
    """

    checkpointing: Checkpointing

    plain_steps = False
    """See `optimization.plain_steps`."""
    only_follows = False
    """Whether, besides, this EST has no part in the update."""

    def __init__(
        self,
        *,
        gradient_offload: Literal["host"] | None,
        input_offload: Literal["host"] | None,
        overlap_backward: Overlap,
        process_group_backend: str | None,
        timeout: timedelta,
        start_method: Literal["popen", "spawn", "fork", "forkserver"],
        ddp_options: dict[str, Any],
    ) -> None:
        super().__init__(
            process_group_backend=process_group_backend, timeout=timeout, start_method=start_method, **ddp_options
        )
        self.session: Session | None = None
        self._gradient_offload = gradient_offload
        self._inputs_wait_elsewhere = "host" in (gradient_offload, input_offload)
        self._overlap_backward = overlap_backward
        self._shown: ShownGradients | None = None
        self._shows_job: Trainer | None = None
        self._user_moves_batches = True
        self._forward_redirection = ForwardRedirection()

    @property
    def resolved_reduction(self) -> str:
        """``"ddp"``, ``"tree"`` or, at level D0, ``"native"``."""
        raise NotImplementedError

    @property
    def device_types(self) -> Sequence[DeviceType]:
        """The type of every executor's device."""
        raise NotImplementedError

    @property
    def is_lead(self) -> bool:
        """Whether this strategy's EST leads its executor."""
        return self.session is None or self.global_rank == self.session.lead

    # -- model and steps -----------------------------------------------------------------------------------------
    def setup(self, trainer: Trainer) -> None:
        """Set up as stock DDP does; what it does to parameters is no write of the user's."""
        module = self.lightning_module
        assert module is not None
        # A compiled forward would be traced with the guard, and its backward make gradients in another order.
        self._watches_steps = not module.automatic_optimization and not has_compiled(module)
        owners = [owner for owner in (module, getattr(trainer, "datamodule", None)) if owner is not None]
        # What comes to the device may then be something that other ESTs read too.
        self._user_moves_batches = any(is_overridden(hook, owner) for owner in owners for hook in _TRANSFER_HOOKS)
        with self._watching_writes(False):
            super().setup(trainer)
        if self.global_rank == 0 and self.session is not None:
            self._shows_job = trainer
            show_job(trainer, self.session.placement, [t.name for t in self.device_types])

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step; only under manual optimization, uncompiled, may it write to parameters."""
        with self._watching_writes(self._watches_steps):
            return super().training_step(*args, **kwargs)

    def validation_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step."""
        with self._watching_writes(False):
            return super().validation_step(*args, **kwargs)

    def test_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step."""
        with self._watching_writes(False):
            return super().test_step(*args, **kwargs)

    def predict_step(self, *args: Any, **kwargs: Any) -> Any:
        """The module's step."""
        with self._watching_writes(False):
            return super().predict_step(*args, **kwargs)

    def backward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The backward pass."""
        with self._watching_writes(False):
            try:
                return super().backward(*args, **kwargs)
            finally:
                if isinstance(self.model, ESTDataParallel):
                    self.model.end_overlap()

    def _watching_writes(self, on: bool) -> AbstractContextManager[None]:
        """Whether writes to the shared parameters are looked at (`runtime.writes`) inside the block."""
        if self.session is None or not self.session.running:
            return nullcontext()
        return self.session.watching_writes(self.global_rank, on)

    def model_to_device(self) -> None:
        """Move the lead's parameters to the device and let the other ESTs alias them."""
        assert self.model is not None
        if not self.is_lead:
            self._alias_parameters(self.model)
        super().model_to_device()
        if self.is_lead and self.session is not None:
            self.session.shared.set(list(self.model.parameters()))

    def _alias_parameters(self, model: Module) -> None:
        assert self.session is not None
        leading = self.session.strategies[self.session.lead].lightning_module
        assert leading is not None
        lead = dict(leading.named_parameters(remove_duplicate=False))
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if name in lead:
                parameter.data = lead[name].data

    def _setup_model(self, model: Module) -> Any:
        session, options = self.session, self._ddp_kwargs
        assert session is not None
        pl.sync_module_states(model)
        wrapper = session.wrap(
            self.global_rank,
            model,
            options,
            private_gradients=self._private_gradients,
            offload=self._gradient_offload,
            overlaps=self._overlap_backward,
            saved_layout=self.checkpointing.saved_layout,
        )
        if self._inputs_wait_elsewhere and len(session.ests) > 1 and not self._user_moves_batches:
            wrapper.inputs = session.inputs.of(self.global_rank)
        return wrapper

    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        """Move a batch to the device; with `input_offload`, it may leave it while the EST waits."""
        with self._watching_writes(self._user_moves_batches):
            moved = super().batch_to_device(batch, device, dataloader_idx)
        if isinstance(self.model, ESTDataParallel) and self.model.inputs is not None:
            self.model.inputs.hold(batch, moved)
        return moved

    @property
    def _private_gradients(self) -> bool:
        """Whether every EST needs reduced gradients of its own, not those of the lead after the update."""
        options = self._ddp_kwargs
        plugin = self.precision_plugin
        # A plugin of the user's own may do anything with them.
        touched = getattr(plugin, "scaler", None) is not None or not type(plugin).__module__.startswith("lightning.")
        unusual = options["find_unused_parameters"] or options["static_graph"] or options["gradient_as_bucket_view"]
        return touched or unusual or reads_gradients(self.lightning_module)

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Accumulate gradients without reducing them."""
        if isinstance(self.model, ESTDataParallel):
            with self.model.no_sync():
                yield
        else:
            yield

    def pre_backward(self, closure_loss: Tensor) -> None:
        """Prepare the module's gradients; manual optimization: reduce the backward that follows."""
        super().pre_backward(closure_loss)
        if self._shown is not None:
            self._shown.part()
        module = self.lightning_module
        if isinstance(self.model, ESTDataParallel):
            if module is not None and not module.automatic_optimization:
                self.model.prepare_for_backward()
            self.model.begin_backward(closure_loss)

    def post_backward(self, closure_loss: Tensor) -> None:
        """The module's gradients are there."""
        if isinstance(self.model, ESTDataParallel):
            self.model.end_backward()
        super().post_backward(closure_loss)

    def _register_ddp_hooks(self) -> None:
        """The communication hook is the runtime's own."""

    # -- optimizers ----------------------------------------------------------------------------------------------
    def setup_optimizers(self, trainer: Trainer) -> None:
        """Create optimizers; only the lead's step."""
        assert self.lightning_module is not None
        drift = DriftCheck(self.lightning_module)
        super().setup_optimizers(trainer)
        assert self.session is not None
        if self.session.placement.num_ests > 1:
            for optimizer in self.optimizers:
                drift.watch(optimizer)
        if self.is_lead:
            self.session.lead_optimizers = self.optimizers
        self.plain_steps = plain_steps(self.lightning_module, self.precision_plugin)
        self.only_follows = False
        if len(self.session.ests) > 1:
            meet = self._meet_before_step if reads_before_step(self.lightning_module) else None
            reduced = self._shown = None
            if not self._private_gradients:
                shown = ShownGradients(self.session.lead_gradients, self.lightning_module, self.optimizers)
                reduced = shown.keep if self.is_lead else shown.show
                self._shown = None if self.is_lead else shown
            self.only_follows = self.plain_steps and self._shown is not None
            clip_where_gradients_are(self.precision_plugin, has_gradients=self._shown is None)
            for index, optimizer in enumerate(self.optimizers):
                follow_lead(
                    optimizer,
                    index,
                    self.session.turns,
                    is_lead=self.is_lead,
                    meet=meet,
                    reduced=reduced,
                    watching_writes=self._watching_writes,
                    watches_closure=lambda: not self.plain_steps,
                )
            self._show_lead_state()

    def on_train_start(self) -> None:
        """Hooks may have been added since optimizers were set up."""
        super().on_train_start()
        assert self.lightning_module is not None
        if not plain_steps(self.lightning_module, self.precision_plugin):
            self.plain_steps = self.only_follows = False

    def follow(self, closure: Callable[[], Any]) -> None:
        """The whole of a step of an EST that only follows."""
        with self._watching_writes(False):
            self.optimizers[0].step(closure)

    def _show_lead_state(self) -> None:
        assert self.session is not None
        if not self.is_lead:
            for optimizer, lead in zip(self.optimizers, self.session.lead_optimizers, strict=True):
                optimizer.state = LeadState(optimizer, lead)  # type: ignore[assignment]
        # Lightning's wrappers copy attributes when they are made.
        self.optimizers = self.optimizers

    def _meet_before_step(self) -> None:
        assert self.session is not None
        self.session.meet_locally(self.global_rank, "before_optimizer_step")

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load the state into the lead's optimizers; the others take the parameter groups only."""
        if self.is_lead:
            super().load_optimizer_state_dict(checkpoint)
            return
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=False):
            optimizer.load_state_dict({**state, "state": {}})
        self._show_lead_state()

    def teardown(self) -> None:
        """Keep parameters shared when the lead's move to the CPU, once every EST has done its last step."""
        session = self.session
        ending = session is None or not session.running or session.executor.failed or session.leaving
        if session is not None and not ending and len(session.ests) > 1:
            session.meet_locally(self.global_rank, "teardown")
        if self._shows_job is not None:
            hide_job(self._shows_job)
            self._shows_job = None
        with self._watching_writes(False):
            if not self.is_lead and self.lightning_module is not None:
                self._alias_parameters(self.lightning_module)
            if isinstance(self.model, ESTDataParallel):
                self.model.remove_hooks()
                self.model = self.lightning_module
            super().teardown()
        if self.is_lead and session is not None:
            session.shared.refresh()
