"""The record keeps exact bits, survives a kill, and continues exactly after a resume."""

import json

import pytest
import torch

from lightning_easyscale.record import (
    Record,
    RecordError,
    TensorBits,
    digest_module,
    digest_optimizers,
    digest_state,
    est_file,
    flatten_tensors,
)
from lightning_easyscale.record_writer import RecordWriter


def write(directory, batches, *, rank=0, num_ests=1, resume=0, value=float):
    writer = RecordWriter(directory, rank=rank, num_ests=num_ests, resume_batch=resume, resume_step=resume)
    for batch in batches:
        writer.step(step=batch, batch=batch, tensors={"loss": torch.tensor(value(batch))})
    writer.close()


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.1),
        torch.tensor(-0.0, dtype=torch.float64),
        torch.tensor([1.5, float("nan"), float("inf")], dtype=torch.bfloat16),
        torch.tensor([[True, False]]),
        torch.arange(6, dtype=torch.int64).reshape(2, 3).t(),
        torch.tensor([1 + 2j], dtype=torch.complex64).conj(),
        torch.empty(0, 3),
    ],
    ids=lambda t: str(t.dtype),
)
def test_bits_survive_writing_and_reading(tmp_path, tensor):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1)
    writer.step(step=0, batch=0, tensors={"x": tensor})
    writer.close()
    bits = Record.load(tmp_path).ests[0].steps[0].tensors["x"]
    assert bits == TensorBits.of(tensor)
    back = bits.tensor()
    assert back.dtype == tensor.dtype
    assert back.shape == tensor.shape
    dense = tensor.resolve_conj().contiguous()
    assert torch.equal(back.reshape(-1).view(torch.uint8), dense.reshape(-1).view(torch.uint8))


def test_what_is_changed_after_the_call_does_not_reach_the_record(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1, flush_every_n_steps=100, flush_seconds=1e9)
    value = torch.ones(())
    writer.step(step=0, batch=0, tensors={"loss": value})
    value.fill_(7)
    writer.close()
    assert Record.load(tmp_path).ests[0].steps[0].tensors["loss"].tensor() == 1


def test_large_tensor_is_kept_as_digest(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1, exact_elements=4)
    writer.step(step=0, batch=0, tensors={"small": torch.ones(4), "large": torch.ones(5)})
    writer.close()
    tensors = Record.load(tmp_path).ests[0].steps[0].tensors
    assert tensors["small"].exact
    assert not tensors["large"].exact
    with pytest.raises(RecordError, match="sha256 alone"):
        tensors["large"].tensor()


def test_killed_run_leaves_a_readable_record(tmp_path):
    write(tmp_path, range(5))
    file = est_file(tmp_path, 0)
    whole = file.read_bytes()
    file.write_bytes(whole[:-20])  # the last line is torn
    assert list(Record.load(tmp_path).ests[0].steps) == [0, 1, 2, 3]


def test_resume_cuts_and_rewrites_exactly(tmp_path):
    write(tmp_path / "whole", range(8))
    write(tmp_path / "resumed", range(6))
    with est_file(tmp_path / "resumed", 0).open("ab") as file:
        file.write(b'{"kind":"step","st')
    write(tmp_path / "resumed", range(4, 8), resume=4)
    assert est_file(tmp_path / "resumed", 0).read_bytes() == est_file(tmp_path / "whole", 0).read_bytes()


def test_resume_keeps_the_digest_of_its_own_starting_point(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1)
    for step in (2, 4, 6):
        writer.digest(step=step, batch=step, states={"parameters": digest_state({"w": torch.tensor(step)})})
    writer.event("exception", step=6, batch=6)
    writer.close()
    RecordWriter(tmp_path, rank=0, num_ests=1, resume_batch=4, resume_step=4).close()
    est = Record.load(tmp_path).ests[0]
    assert list(est.digests) == [2, 4]
    assert est.events == []


def test_fresh_run_moves_an_old_record_aside(tmp_path):
    write(tmp_path, range(3))
    before = est_file(tmp_path, 0).read_bytes()
    write(tmp_path, range(1))
    assert list(Record.load(tmp_path).ests[0].steps) == [0]
    assert (tmp_path / "est-00000.jsonl.old-1").read_bytes() == before


def test_entries_are_on_disk_before_close(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1, flush_every_n_steps=2)
    for batch in range(5):
        writer.step(step=batch, batch=batch, tensors={"loss": torch.tensor(1.0)})
    writer.flush(wait=True)
    assert len(Record.load(tmp_path).ests[0].steps) == 5
    writer.close()


def test_error_of_the_writing_thread_reaches_the_training_thread(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1)
    writer._file.close()
    writer._file = est_file(tmp_path, 0).open("rb")  # stands for a disk that refuses to be written
    writer.step(step=0, batch=0, tensors={})
    with pytest.raises(OSError, match="write"):
        writer.flush(wait=True)
    writer.close()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "does not start with a header"),
        (b'{"kind":"step"}\n', "does not start with a header"),
        (b'{"kind":"header","schema":99,"rank":0,"num_ests":1}\n', "schema 99"),
        (b'{"kind":"header","schema":1,"rank":0,"num_ests":1}\nnonsense\n{}\n', "damaged at line 2"),
    ],
)
def test_unusable_record_is_refused(tmp_path, content, message):
    est_file(tmp_path, 0).write_bytes(content)
    with pytest.raises(RecordError, match=message):
        Record.load(tmp_path)


def test_empty_directory_and_mixed_runs_are_refused(tmp_path):
    with pytest.raises(RecordError, match="no run record"):
        Record.load(tmp_path)
    write(tmp_path, range(1), rank=0, num_ests=2)
    write(tmp_path, range(1), rank=1, num_ests=3)
    with pytest.raises(RecordError, match=r"runs of \[2, 3\] ESTs"):
        Record.load(tmp_path)


def test_series_and_completeness(tmp_path):
    write(tmp_path, range(3), rank=0, num_ests=2, value=lambda b: b / 4)
    write(tmp_path, range(2), rank=1, num_ests=2)
    record = Record.load(tmp_path)
    assert record.ests[0].series() == ([0, 1, 2], [0.0, 0.25, 0.5])
    assert record.is_complete(batches=2)
    assert not record.is_complete(batches=3)


def test_flatten_names_nested_outputs():
    a, b, c = torch.tensor(1), torch.tensor(2), torch.tensor(3)
    assert flatten_tensors(a) == {"loss": a}
    assert flatten_tensors({"loss": a, "parts": [b, {"deep": c}], "note": "text"}) == {
        "loss": a,
        "parts.0": b,
        "parts.1.deep": c,
    }
    assert flatten_tensors(None) == {}


def test_digest_depends_on_every_property_of_a_tensor_and_not_on_order():
    x = torch.zeros(4)
    base = digest_state({"a": x, "b": torch.ones(2)})
    assert digest_state([("b", torch.ones(2)), ("a", x)]) == base
    for changed in (torch.tensor([0.0, 0, 0, -0.0]), x.reshape(2, 2), x.double(), x.to(torch.int32)):
        other = digest_state({"a": changed, "b": torch.ones(2)})
        assert other.total != base.total
        assert base.first_difference(other) == "a"
    assert base.first_difference(digest_state({"a": x})) == "b"
    with pytest.raises(ValueError, match="'a' twice"):
        digest_state([("a", x), ("a", x)])


def test_module_digest_covers_buffers_outside_the_state_dict():
    module = torch.nn.BatchNorm1d(2)
    module.register_buffer("hidden", torch.zeros(1), persistent=False)
    before = digest_module(module)
    module.hidden += 1
    after = digest_module(module)
    assert after["parameters"] == before["parameters"]
    assert before["buffers"].first_difference(after["buffers"]) == "hidden"


def test_optimizer_digest_is_keyed_by_name_not_by_order():
    def trained(reverse):
        torch.manual_seed(0)
        model = torch.nn.Linear(3, 2)
        parameters = list(model.parameters())
        optimizer = torch.optim.Adam(parameters[::-1] if reverse else parameters)
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        return model, optimizer

    (model_a, a), (model_b, b) = trained(False), trained(True)
    one, two = digest_optimizers([a], model_a), digest_optimizers([b], model_b)
    assert one == two
    assert {"0.weight.exp_avg", "0.bias.step", "0.group0.lr"} <= set(one.tensors)
    b.param_groups[0]["lr"] = 0.5
    assert one.first_difference(digest_optimizers([b], model_b)) == "0.group0.lr"


def test_lines_are_plain_json_with_bits_in_hexadecimal(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1)
    writer.step(step=3, batch=6, tensors={"loss": torch.tensor(1.0)})
    writer.close()
    line = json.loads(est_file(tmp_path, 0).read_text().splitlines()[1])
    assert line == {"kind": "step", "step": 3, "batch": 6, "tensors": {"loss": ["float32", [], "0000803f"]}}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_recording_on_cuda_never_waits_for_the_device(tmp_path):
    writer = RecordWriter(tmp_path, rank=0, num_ests=1, flush_every_n_steps=4, flush_seconds=1e9)
    expected = torch.rand(20, 3, device="cuda")
    values = expected.clone()
    torch.cuda.synchronize()
    try:
        torch.cuda.set_sync_debug_mode("error")
        for batch in range(20):
            torch.cuda._sleep(1_000_000)  # keeps the device behind, so that an early read would show
            values[batch].mul_(1.0)
            writer.step(step=batch, batch=batch, tensors={"loss": values[batch, 0], "row": values[batch]})
            values[batch].zero_()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    writer.close()
    steps = Record.load(tmp_path).ests[0].steps
    assert torch.equal(torch.stack([steps[b].tensors["row"].tensor() for b in range(20)]), expected.cpu())
    assert torch.equal(torch.stack([steps[b].tensors["loss"].tensor() for b in range(20)]), expected[:, 0].cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_digest_does_not_depend_on_the_device():
    tensors = {"a": torch.randn(5, 7), "b": torch.arange(3).bfloat16()}
    assert digest_state({name: t.cuda() for name, t in tensors.items()}) == digest_state(tensors)
