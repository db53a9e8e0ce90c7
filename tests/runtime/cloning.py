"""What the tests of the structural clone share."""

from torch import nn

from lightning_easyscale.runtime.clone import structural_clone


def clone(*roots, share=lambda value: False):
    made = structural_clone(roots, share=share)
    return made[0] if len(roots) == 1 else made


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.bn = nn.BatchNorm1d(3)

    def forward(self, x):
        return self.bn(self.a(x))


class Bag:
    def __init__(self, **values):
        self.__dict__.update(values)
