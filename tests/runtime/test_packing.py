"""What executors tell each other arrives as it was."""

from __future__ import annotations

import pytest
import torch

from lightning_easyscale.runtime.packing import pack, unpack

TENSORS = {
    "float": torch.randn(3, 5),
    "bfloat16": torch.randn(7).bfloat16(),
    "complex": torch.randn(3, dtype=torch.complex128),
    "bool": torch.tensor([True, False, True]),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 4),
    "transposed": torch.randn(4, 6).t(),
    "part": torch.arange(10)[3:8:2],
    "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
    "parameter": torch.nn.Parameter(torch.randn(2)),
    "leaf": torch.randn(2, requires_grad=True),
    "sparse": torch.eye(3).to_sparse(),
}


@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_arrives_with_its_bits_type_and_shape(name: str) -> None:
    tensor = TENSORS[name]
    # Behind bytes of any length, as they come out of a header or of a gathered message.
    for text in ("", "a", "b" * 30):
        got_text, got = unpack(pack((text, tensor)))
        assert got_text == text
        assert (type(got), got.dtype, got.shape) == (type(tensor), tensor.dtype, tensor.shape)
        assert got.requires_grad == tensor.requires_grad
        assert got.is_sparse or name in ("part", "conjugate") or got.stride() == tensor.stride()
        assert torch.equal(got.to_dense(), tensor.to_dense())


def test_one_tensor_sent_twice_arrives_as_one_and_in_memory_of_its_own(tmp_path) -> None:
    one, other = torch.randn(3), torch.arange(4)
    got = unpack(pack({"a": [one, other], "b": (one, None, 7)}))
    assert got["a"][0] is got["b"][0]
    assert torch.equal(got["a"][1], other)
    assert got["b"][1:] == (None, 7)
    torch.save(got, tmp_path / "saved.pt")
    assert got["a"][0].untyped_storage().nbytes() == one.untyped_storage().nbytes()


def test_a_large_tensor_is_not_pickled() -> None:
    numel = 1 << 20
    assert pack(torch.zeros(numel)).numel() < 4 * numel + 300
    assert pack(torch.zeros(1 << 22)[5:6]).numel() < 300
