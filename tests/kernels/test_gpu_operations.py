"""On a GPU: every operation of the portable policy, forward and backward, has the bits it has on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_easyscale.kernels import build, portable

from .cases import CASES, Case, differences, operands, run
from .mirror import Mirror
from .training import convolutional, losses_and_parameters, transformer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(bool(build.why_unavailable()), reason=build.why_unavailable() or "available"),
]


@pytest.mark.parametrize("name", CASES)
def test_gpu_bits_equal_cpu_bits(name):
    for seed, scale in ((0, 1.0), (1, 30.0)):
        given = operands(CASES[name], seed, scale=scale)
        assert differences(run(CASES[name], given), run(CASES[name], given, device="cuda")) == []


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CASES)
def test_gpu_bits_equal_cpu_bits_in_reduced_precision(name, dtype):
    given = operands(CASES[name])
    assert differences(run(CASES[name], given, dtype=dtype), run(CASES[name], given, device="cuda", dtype=dtype)) == []


def test_a_convolution_in_channels_last_has_the_cpus_bits():
    case = CASES["conv"]
    given = operands(case)
    expected = run(case, given)
    given[0] = given[0].contiguous(memory_format=torch.channels_last)
    assert differences(expected, run(case, given, device="cuda")) == []


def test_a_weight_gradient_over_a_million_places_has_the_cpus_bits():
    case = Case(lambda x, w: nn.functional.conv2d(x, w, padding=1), ((16, 3, 250, 251), (4, 3, 3, 3)))
    given = operands(case)
    assert differences(run(case, given), run(case, given, device="cuda")) == []


@pytest.mark.parametrize("groups", [1, 2])
def test_a_large_pointwise_convolution_of_images_of_49_pixels_has_the_cpus_bits(groups):
    case = Case(lambda x, w: nn.functional.conv2d(x, w, groups=groups), ((64, 640, 7, 7), (640, 640 // groups, 1, 1)))
    given = operands(case)
    assert differences(run(case, given), run(case, given, device="cuda")) == []


@pytest.mark.parametrize("kind", ["dropout", "bernoulli", "rand", "randn", "uniform", "normal", "randint", "randperm"])
def test_random_operations_have_the_cpus_bits(kind):
    def draw(device):
        torch.manual_seed(5)
        x = torch.ones(1001, device=device, requires_grad=True)
        with portable():
            if kind == "dropout":
                y = nn.functional.dropout(x, 0.3) * 3
                return [y.detach().cpu(), *(g.cpu() for g in torch.autograd.grad(y.sum(), [x]))]
            made = {
                "bernoulli": lambda: torch.full_like(x, 0.3).bernoulli(),
                "rand": lambda: torch.rand(77, device=device),
                "randn": lambda: torch.randn_like(x),
                "uniform": lambda: torch.empty(77, device=device).uniform_(-2, 3),
                "normal": lambda: torch.empty(77, device=device).normal_(1, 0.1),
                "randint": lambda: torch.randint(0, 1000, (77,), device=device).float(),
                "randperm": lambda: torch.randperm(1000, device=device).float(),
            }[kind]()
        return [made.detach().cpu()]

    assert differences(draw("cpu"), draw("cuda")) == []


@pytest.mark.parametrize("model", [convolutional, transformer])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_twenty_training_steps_have_the_cpus_bits(model, optimizer):
    expected = losses_and_parameters(model, optimizer, device="cpu", steps=20)
    assert differences(expected, losses_and_parameters(model, optimizer, device="cuda", steps=20)) == []


@pytest.mark.parametrize("model", [convolutional, transformer])
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "adamw"])
def test_every_operation_of_a_training_step_has_the_cpus_bits(model, optimizer):
    mirror = Mirror()
    losses_and_parameters(model, optimizer, device="cuda", steps=3, mode=mirror)
    assert mirror.calls > 100
    assert mirror.found == []
