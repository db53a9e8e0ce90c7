"""Small training scenarios, run by stock DDP and by our collector, in the pool's processes."""

from __future__ import annotations

import contextlib
import hashlib
import warnings
from collections.abc import Iterator
from unittest.mock import patch

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from lightning_easyscale.placement import Placement
from lightning_easyscale.reduction import bucket_gradients
from lightning_easyscale.reduction.bucket_gradients import BucketGradients
from lightning_easyscale.reduction.collector import ESTDataParallel
from lightning_easyscale.reduction.exchange import RingReduction
from lightning_easyscale.reduction.gradients import GradientReduce
from lightning_easyscale.reduction.hook import ordered_allreduce_hook
from lightning_easyscale.reduction.tree_gradients import TreeGradients

STEPS = 5
CAP_MB = 0.01


class Through(torch.autograd.Function):
    """Hands on its first input; the second gets no gradient, though it was used."""

    @staticmethod
    def forward(_: object, x: Tensor, weight: Tensor) -> Tensor:
        return x * 1

    @staticmethod
    def backward(_: object, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad, None


class Model(nn.Module):
    """Tied, frozen, scalar, channels-last, bf16 and conditionally used parameters."""

    def __init__(self, scenario: str) -> None:
        super().__init__()
        self.scenario = scenario
        self.body = nn.Linear(8, 24)
        self.tied = nn.Linear(24, 24)
        self.again = self.tied
        self.frozen = nn.Linear(24, 24).requires_grad_(False)
        self.gain = nn.Parameter(torch.tensor(1.3))
        self.conv = nn.Conv2d(2, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.low = nn.Linear(24, 24).bfloat16()
        self.norm = nn.BatchNorm1d(24)
        self.sometimes = nn.Linear(24, 24)
        self.never = nn.Linear(24, 24)
        self.aside = nn.Linear(24, 2)
        if scenario == "hooked":
            self.bypassed = nn.Parameter(torch.ones(300))
        if scenario == "aliased":
            self.one, self.other = nn.Parameter(torch.rand(1200)), nn.Parameter(torch.rand(30, 40))
        if scenario == "reordered":
            # Together they fill a bucket.
            self.pair = nn.ParameterList(torch.rand(1400) for _ in range(2))
        if scenario not in ("unused", "static"):
            self.never.requires_grad_(False)
        if scenario not in ("unused",):
            self.sometimes.requires_grad_(scenario != "static")
            self.aside.requires_grad_(scenario == "two_backwards")

    def forward(self, x: Tensor, step: int, rank: int) -> tuple[Tensor, Tensor]:
        h = self.norm(self.again(torch.relu(self.tied(self.body(x)))))
        h = self.frozen(h) * self.gain
        if self.scenario == "hooked":
            h = Through.apply(h, self.bypassed)
        if self.scenario == "aliased":
            # Autograd lets the two gradients be views of one memory.
            h = h * (self.one.view(-1) + self.other.view(-1)).square().mean()
        if self.scenario == "reordered":
            # Autograd goes backwards through what came last.
            parts = [(h.mean() * self.pair[i]).square().mean() for i in ((1, 0) if step % 2 else (0, 1))]
            h = h + parts[0] + parts[1]
        if self.scenario == "static":
            h = checkpoint(lambda t: torch.tanh(self.tied(t)), h, use_reentrant=True)
        # One rank only; never at the last step but one; and in accumulation at step 2.
        if self.scenario != "unused" or (rank == 1 and step != STEPS - 2) or step == 2:
            h = h + self.sometimes(h)
        image = self.conv(x.view(len(x), 2, 2, 2)).square().sum()
        return self.low(h.bfloat16()).float().square().sum() + image, self.aside(h.detach()).square().sum()


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 8, generator=torch.Generator().manual_seed(97 * step + rank))


def digest(module: nn.Module) -> str:
    sha = hashlib.sha256()
    for p in module.parameters():
        data = b"none" if p.grad is None else p.grad.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()
        sha.update(data)
        sha.update(p.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()[:16]


def train(scenario: str, workers: dict[int, nn.Module], announced: bool = False) -> dict[int, list[str]]:
    """Run the ESTs (or the one rank) of this process one after the other; digests of gradients and parameters."""
    seen: dict[int, list[str]] = {rank: [] for rank in workers}
    if scenario == "hooked":
        for rank, model in workers.items():
            # Made after the wrapper: still heard before it.
            for p in model.module.body.parameters():  # type: ignore[union-attr]
                p.register_hook(lambda grad, rank=rank: grad * (1 + rank))
                p.register_post_accumulate_grad_hook(_shrink)
    for step in range(STEPS):
        accumulating = scenario in ("accumulate", "unused", "reordered") and step == 2
        for rank, model in workers.items():
            if scenario == "zeroed":
                model.zero_grad(set_to_none=False)
            elif scenario in ("plain", "two_backwards", "static", "hooked", "aliased") or step % 2 == 0:
                model.zero_grad()
            with model.no_sync() if accumulating else contextlib.nullcontext():  # type: ignore[operator]
                main, aside = model(batch(step, rank), step, rank)
                with _told(model, main) if announced else contextlib.nullcontext():
                    main.backward(retain_graph=scenario == "two_backwards")
                if scenario == "two_backwards":
                    with _told(model, aside) if announced else contextlib.nullcontext():
                        aside.backward()
        for rank, model in workers.items():
            seen[rank].append(digest(model))
            if not accumulating:
                with torch.no_grad():
                    for p in model.parameters():
                        if p.grad is not None:
                            p.sub_(p.grad, alpha=1e-3)
    return seen


@contextlib.contextmanager
def _told(model: nn.Module, loss: Tensor) -> Iterator[None]:
    assert isinstance(model, ESTDataParallel)
    model.begin_backward(loss)
    yield
    model.end_backward()


def _shrink(parameter: Tensor) -> None:
    assert parameter.grad is not None
    parameter.grad.mul_(0.7)


def build(scenario: str) -> Model:
    torch.manual_seed(3)
    return Model(scenario)


def stock(
    group: dist.ProcessGroup, rank: int, scenario: str, order: str = "tree", view: bool = False
) -> dict[int, list[str]]:
    """A stock DDP rank; with the ordered hook for the `tree` order."""
    with warnings.catch_warnings():
        # torch 2.13 renamed `broadcast_buffers` and warns of the old name.
        warnings.simplefilter("ignore", FutureWarning)
        model = DistributedDataParallel(
            build(scenario),
            process_group=group,
            bucket_cap_mb=CAP_MB,  # type: ignore[arg-type]
            find_unused_parameters=scenario == "unused",
            static_graph=scenario == "static",
            gradient_as_bucket_view=view,
            broadcast_buffers=False,
        )
    if order == "tree":
        model.register_comm_hook(group, ordered_allreduce_hook)
    return train(scenario, {rank: model})


def collected(
    group: dist.ProcessGroup,
    executor: int,
    scenario: str,
    placement: tuple[int, ...],
    order: str = "tree",
    view: bool = False,
    announced: bool = False,
    waits: bool = False,
    private: bool = True,
) -> dict[int, list[str]]:
    """The ESTs of one executor, run one after the other; gradients wait on the host, or are the lead's alone."""
    with contextlib.ExitStack() as patched:
        if waits:
            for name, value in (("serves", True), ("spare", 1 << 40)):
                patched.enter_context(patch.object(bucket_gradients.Aside, name, staticmethod(lambda _, v=value: v)))
        where, physical = Placement(placement), group if group.size() > 1 else None
        gradients: GradientReduce
        if order == "tree":
            gradients = TreeGradients(where, executor, physical, private_gradients=True, bucket_cap_mb=CAP_MB)
        else:
            gradients = BucketGradients(
                RingReduction(where, executor, physical, where.num_ests),
                private_gradients=private,
                offload="host" if waits else None,
                bucket_cap_mb=CAP_MB,
                find_unused_parameters=scenario == "unused",
                static_graph=scenario == "static",
                gradient_as_bucket_view=view,
            )
        workers: dict[int, nn.Module] = {
            rank: ESTDataParallel(
                build(scenario),
                rank=rank,
                n=where.num_ests,
                reduce=gradients,
                find_unused_parameters=scenario == "unused",
                static_graph=scenario == "static",
                broadcast_buffers=False,
            )
            for rank in where.ranges[executor]
        }
        if not private:
            lead, *others = workers.values()
            for other in others:
                for theirs, own in zip(lead.parameters(), other.parameters(), strict=True):
                    own.data = theirs.data
        with torch.autograd.set_multithreading_enabled(False):
            seen = train(scenario, workers, announced)
        gradients.close()
        return seen
