"""Many small tensors as one stretch of bytes, which is packed and read in one call per type.

What EST 0 tells the others before a forward is the same kind of thing in every step: a parcel is made once, with views
of its bytes as the tensors in it, and used again when the last EST has read it. Its memory is not the tensors' own, so
EST 0 may go on. Invariant: a parcel's bytes depend on the tensors' types, sizes and order alone, not on the executor.
"""

from __future__ import annotations

from collections.abc import Sequence
from operator import attrgetter

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

_KEPT_BYTES = 8 << 20  # a larger one is given back to the allocator between steps

_shape = attrgetter("shape")


class Parcel:
    """Room for groups of tensors.

    Args:
        groups: tensors like those that are to be sent, those of one type and device together.

    Attributes:
        messages: the bytes, one flat tensor per device.
        readers: how many ESTs have yet to come for it.
    """

    def __init__(self, groups: Sequence[list[Tensor]]) -> None:
        self.readers = 0
        self._shapes = [list(map(_shape, group)) for group in groups]
        self._kinds = [(group[0].dtype, group[0].device) for group in groups]
        views: dict[int, Sequence[Tensor]] = {}
        self.messages: list[Tensor] = []
        # Also where a validation makes it, for the training that follows.
        with torch.inference_mode(False), torch.no_grad():
            for device in dict.fromkeys(device for _, device in self._kinds):
                # From long elements to short ones, each begins where its type may.
                there = [i for i, (_, d) in enumerate(self._kinds) if d == device]
                there.sort(key=lambda i: -self._kinds[i][0].itemsize)
                sizes = [sum(map(Tensor.numel, groups[i])) * self._kinds[i][0].itemsize for i in there]
                message = torch.empty(sum(sizes), dtype=torch.uint8, device=device)
                self.messages.append(message)
                for i, part in zip(there, message.split(sizes), strict=True):
                    views[i] = _unflatten_dense_tensors(part.view(self._kinds[i][0]), groups[i])
        self._views = [list(views[i]) for i in range(len(groups))]

    @property
    def nbytes(self) -> int:
        """Size of all messages."""
        return sum(message.numel() for message in self.messages)

    def fits(self, groups: Sequence[list[Tensor]]) -> bool:
        """Whether it was made for such tensors."""
        if [(group[0].dtype, group[0].device) for group in groups] != self._kinds:
            return False
        # In-place changes of a size leave the objects what they were.
        return all(list(map(_shape, group)) == shapes for group, shapes in zip(groups, self._shapes, strict=True))

    def pack(self, groups: Sequence[list[Tensor]]) -> None:
        """Take the tensors' values."""
        for views, group in zip(self._views, groups, strict=True):
            torch._foreach_copy_(views, group)

    def read(self, groups: Sequence[list[Tensor]]) -> None:
        """Give tensors its values."""
        for views, group in zip(self._views, groups, strict=True):
            torch._foreach_copy_(group, views)


class Parcels:
    """The parcels of one executor: as many as are under way at a time.

    Args:
        readers: how many ESTs come for each.
    """

    def __init__(self, readers: int) -> None:
        self._readers = readers
        self._free: list[Parcel] = []

    def take(self, groups: Sequence[list[Tensor]]) -> Parcel:
        """One that nobody reads any more."""
        parcel = None
        while self._free and parcel is None:
            parcel = self._free.pop()
            parcel = parcel if parcel.fits(groups) else None
        parcel = parcel or Parcel(groups)
        parcel.readers = self._readers
        return parcel

    def done(self, parcel: Parcel) -> None:
        """One of the ESTs has come for it; it may be used again when all have."""
        parcel.readers -= 1
        if not parcel.readers and parcel.nbytes <= _KEPT_BYTES:
            self._free.append(parcel)
