"""The structural clone: parameters and tensors; `test_clone_*.py` have the rest."""

import pytest
import torch
from torch import nn

from lightning_easyscale.runtime.clone import alias_parameters

from .cloning import Net, clone


def test_parameters_are_own_objects_over_the_same_storage():
    net = Net()
    net.a.weight.tag = ["per rank"]
    net.a.bias.requires_grad_(False)
    made = clone(net)
    for old, new in zip(net.parameters(), made.parameters(), strict=True):
        assert new is not old
        assert type(new) is nn.Parameter
        assert new.requires_grad == old.requires_grad
        assert new.data_ptr() == old.data_ptr()
    assert made.a.weight.tag == ["per rank"]
    assert made.a.weight.tag is not net.a.weight.tag
    assert made.bn.running_mean.data_ptr() != net.bn.running_mean.data_ptr()


def test_gradients_are_not_shared():
    net = Net()
    net(torch.randn(4, 3)).sum().backward()
    made = clone(net)
    assert torch.equal(made.a.bias.grad, net.a.bias.grad)
    made(torch.randn(4, 3)).square().sum().backward()
    assert not torch.equal(made.a.bias.grad, net.a.bias.grad)


def test_tied_parameters_stay_tied():
    net = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    net[1].weight = net[0].weight
    made = clone(net)
    assert made[1].weight is made[0].weight


def test_parameter_subclass_and_dtype_are_kept():
    class Scale(nn.Parameter):
        pass

    net = nn.Module()
    net.scale = Scale(torch.ones(2, dtype=torch.bfloat16))
    made = clone(net)
    assert type(made.scale) is Scale
    assert made.scale.dtype == torch.bfloat16
    assert made.scale.data_ptr() == net.scale.data_ptr()


def test_lazy_parameters_are_materialised_per_clone():
    net = nn.LazyLinear(2)
    made = clone(net)
    made(torch.randn(1, 3))
    assert made.weight.shape == (2, 3)
    assert isinstance(net.weight, nn.UninitializedParameter)


@pytest.mark.parametrize("before", [True, False])
def test_a_view_of_a_parameter_stays_one(before):
    net = Net()
    view = net.a.weight.data[0]
    roots = ([view], net) if before else (net, [view])
    made = clone(roots[0], roots[1])
    made_view = made[0][0] if before else made[1][0]
    assert made_view is not view
    assert made_view.data_ptr() == net.a.weight.data_ptr()


def test_views_of_one_storage_keep_sharing():
    base = torch.arange(6.0)
    made = clone({"base": base, "row": base.view(2, 3)[1]})
    made["row"].zero_()
    assert made["base"].tolist() == [0, 1, 2, 0, 0, 0]
    assert base.tolist() == [0, 1, 2, 3, 4, 5]


def test_non_leaf_tensors_lose_their_graph():
    net = Net()
    net.last = net(torch.randn(4, 3))
    made = clone(net)
    assert made.last.grad_fn is None
    assert torch.equal(made.last, net.last)
    assert made.last.data_ptr() != net.last.data_ptr()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        torch.tensor([1 + 2j]).conj(),
        torch.empty(0),
        torch.randn(4, 4).t(),
        torch.tensor(2.0, requires_grad=True),
    ],
    ids=["sparse", "meta", "conj", "empty", "strided", "leaf"],
)
def test_other_tensors_are_copied(tensor):
    made = clone(tensor)
    assert made is not tensor
    assert (made.layout, made.shape, made.requires_grad) == (tensor.layout, tensor.shape, tensor.requires_grad)
    if tensor.device.type != "meta":
        assert torch.equal(made.to_dense(), tensor.to_dense())


def test_inference_tensors_are_copied():
    with torch.inference_mode():
        tensor = torch.ones(2)
    assert clone([tensor])[0].is_inference()


def test_tensors_in_shared_memory_stay_shared():
    tensor = torch.zeros(2).share_memory_()
    assert clone([tensor])[0] is tensor


def test_torch_generators_continue_with_the_same_state():
    generator = torch.Generator().manual_seed(3)
    torch.rand(5, generator=generator)
    made = clone(generator)
    first = torch.rand(3, generator=made)
    assert torch.equal(first, torch.rand(3, generator=generator))
    assert clone([torch.default_generator])[0] is torch.default_generator


def test_optimizer_refers_to_the_clones_parameters():
    net = Net()
    net.opt = torch.optim.Adam(net.parameters())
    net.opt.note = "user's"
    net.sched = torch.optim.lr_scheduler.StepLR(net.opt, 1)
    net(torch.randn(4, 3)).sum().backward()
    net.opt.step()
    made = clone(net)
    own = list(made.parameters())
    assert [id(p) for p in made.opt.param_groups[0]["params"]] == [id(p) for p in own]
    assert {id(p) for p in made.opt.state} == {id(p) for p in own}
    assert made.opt.state[own[0]]["exp_avg"].data_ptr() != net.opt.state[net.a.weight]["exp_avg"].data_ptr()
    assert made.opt.note == "user's"
    assert made.sched.optimizer is made.opt
    made.opt.step()  # counted by the scheduler's own wrapper, else it would warn
    made.sched.step()
    assert net.opt.param_groups[0]["lr"] != made.opt.param_groups[0]["lr"]


def test_alias_parameters_after_late_creation():
    net, made = nn.Linear(2, 2), nn.Linear(2, 2)
    alias_parameters(net, made)
    assert made.weight.data_ptr() == net.weight.data_ptr()
    with pytest.raises(ValueError, match=r"other parameters than `source`: \['weight'\]"):
        alias_parameters(net, nn.Linear(3, 2))
