"""`compare` says equal only of equal bits, and else names the first step, EST and tensor."""

import subprocess
import sys

import pytest
import torch

from lightning_easyscale.compare import CompareError, compare, compare_covered, main
from lightning_easyscale.digest import digest_state
from lightning_easyscale.record_writer import RecordWriter


def one_ulp(value):
    return torch.nextafter(torch.tensor(value), torch.tensor(float("inf"))).item()


def make(directory, *, steps=4, num_ests=2, change=None, digests=(2, 4), optimizer=(0, 1), state=None, per_step=1):
    """A record whose EST r has loss r + batch / 8 at each batch; `change[(batch, rank)]` replaces a loss."""
    for rank in range(num_ests):
        writer = RecordWriter(directory, rank=rank, num_ests=num_ests)
        for batch in range(steps * per_step):
            loss = (change or {}).get((batch, rank), rank + batch / 8)
            tensors = {} if loss is None else {"loss": torch.tensor(loss), "extra": torch.ones(2)}
            writer.step(step=batch // per_step, batch=batch, tensors=tensors)
            if batch + 1 in digests:
                w = (state or {}).get((batch + 1, rank), 0.0)
                states = {"parameters": digest_state({"layer.weight": torch.tensor(w)})}
                if rank in optimizer:
                    states["optimizer"] = digest_state({"0.layer.weight.step": torch.tensor(batch)})
                writer.digest(step=batch + 1, batch=batch + 1, states=states)
        writer.event("start", step=0, batch=0, data={"path": str(directory)})
        writer.close()
    return directory


def test_equal_records(tmp_path, capsys):
    a, b = make(tmp_path / "a"), make(tmp_path / "b")
    assert compare(a, b) is None
    assert main([str(a), str(b)]) == 0
    out = capsys.readouterr().out
    assert out.startswith("bitwise equal")
    assert "4 steps x 2 ESTs, 16 tensors of 8 micro-batches" in out
    assert "8 state digests" in out


def test_one_bit_in_one_loss_is_named(tmp_path, capsys):
    a = make(tmp_path / "a")
    b = make(tmp_path / "b", change={(2, 1): one_ulp(1.25), (3, 0): 9.0})
    difference = compare(a, b)
    assert (difference.step, difference.rank, difference.batch) == (2, 1, 2)
    assert difference.what == "tensor `loss`"
    assert difference.bits_a == "3fa00000"
    assert difference.bits_b == "3fa00001"
    assert main([str(a), str(b)]) == 1
    out = capsys.readouterr().out
    assert "first difference: step 2, EST 1, tensor `loss`" in out
    assert "1 of 32 bits differ, A xor B = 0x00000001" in out


def test_negative_zero_is_not_zero_and_nan_equals_itself(tmp_path):
    a = make(tmp_path / "a", change={(0, 0): 0.0, (1, 0): float("nan")})
    b = make(tmp_path / "b", change={(0, 0): 0.0, (1, 0): float("nan")})
    c = make(tmp_path / "c", change={(0, 0): -0.0, (1, 0): float("nan")})
    assert compare(a, b) is None
    assert compare(a, c).bits_b == "80000000"


def test_digest_difference_names_the_tensor(tmp_path):
    a, b = make(tmp_path / "a"), make(tmp_path / "b", state={(2, 1): 1.0})
    difference = compare(a, b)
    assert (difference.step, difference.rank, difference.what) == (2, 1, "digest of parameters `layer.weight`")


def test_missing_entries_are_differences(tmp_path):
    a = make(tmp_path / "a")
    shorter = make(tmp_path / "shorter", steps=3)
    difference = compare(a, shorter)
    assert (difference.step, difference.rank, difference.what, difference.b) == (3, 0, "micro-batch", None)
    assert compare(a, shorter, common=True) is None
    without = make(tmp_path / "without", change={(1, 0): None})
    assert compare(a, without).what == "tensor `loss`"
    (tmp_path / "shorter" / "est-00001.jsonl").unlink()
    assert compare(a, shorter).what == "record of this EST"
    assert compare(a, make(tmp_path / "n3", num_ests=3)).what == "number of ESTs"


def test_digests_count_where_both_runs_have_them(tmp_path):
    a, b = make(tmp_path / "a", digests=(2, 4)), make(tmp_path / "b", digests=(3, 4))
    difference, coverage = compare_covered(a, b)
    assert difference is None
    assert coverage.states == 4


def test_optimizer_state_may_be_absent_past_rank_0_only(tmp_path):
    whole, shared = make(tmp_path / "whole"), make(tmp_path / "shared", optimizer=(0,))
    assert compare(whole, shared) is None
    none = make(tmp_path / "none", optimizer=())
    assert compare(whole, none).what == "optimizer"


def test_steps_restrict_to_one_stage(tmp_path):
    a = make(tmp_path / "a", digests=(1, 2, 3, 4))
    b = make(tmp_path / "b", digests=(1, 2, 3, 4), change={(2, 0): 5.0}, state={(3, 0): 7.0})
    assert compare(a, b, steps=(0, 2)) is None
    assert compare(a, b, steps=(2, 4)).step == 2
    assert compare(a, b, steps=(3, 4)) is None
    with pytest.raises(CompareError, match=r"no tensor to compare in steps 9\.\.11"):
        compare(a, b, steps=(9, 12))


def test_micro_batches_of_one_step_are_told_apart(tmp_path):
    a = make(tmp_path / "a", per_step=2, digests=())
    b = make(tmp_path / "b", per_step=2, digests=(), change={(5, 1): 3.0})
    difference = compare(a, b)
    assert (difference.step, difference.batch) == (2, 5)
    assert "micro-batch 5" in str(difference)


def checkpoint(path, **entries):
    base = {
        "state_dict": {"w": torch.arange(4.0), "n": torch.tensor(3)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1}]}],
        "loops": {"fit_loop": {"total": 5}},
        "global_step": 5,
        "pytorch-lightning_version": "2.6.6",
    }
    torch.save({**base, **entries}, path)
    return path


def test_checkpoints(tmp_path, capsys):
    a, b = checkpoint(tmp_path / "a.ckpt"), checkpoint(tmp_path / "b.ckpt", callbacks={"other": 1})
    assert compare(a, b) is None
    assert main([str(a), str(b)]) == 0
    assert "state_dict, optimizer_states, loops, global_step" in capsys.readouterr().out

    w = torch.arange(4.0)
    w[2] = one_ulp(2.0)
    changed = checkpoint(tmp_path / "c.ckpt", state_dict={"w": w, "n": torch.tensor(3)}, global_step=6)
    difference = compare(a, changed)
    assert difference.what == "state_dict.w, element 2 of 4 (1 differ)"
    assert (difference.bits_a, difference.bits_b) == ("40000000", "40000001")
    assert compare(a, changed, sections=["optimizer_states"]) is None
    assert compare(a, changed, sections=["global_step"]).what == "global_step"


def test_checkpoint_leaves(tmp_path):
    a = checkpoint(tmp_path / "a.ckpt")
    states = [{"state": {0: {"step": torch.tensor(1.0)}}, "param_groups": [{"lr": 0.1000000001}]}]
    assert compare(a, checkpoint(tmp_path / "b.ckpt", optimizer_states=states)).what == (
        "optimizer_states.0.param_groups.0.lr"
    )
    assert compare(a, checkpoint(tmp_path / "c.ckpt", optimizer_states=[])).b is None
    assert compare(a, checkpoint(tmp_path / "d.ckpt", state_dict={"w": torch.arange(4.0)})).what == "state_dict.n"
    half = {"w": torch.arange(4.0).half(), "n": torch.tensor(3)}
    assert "float16" in compare(a, checkpoint(tmp_path / "e.ckpt", state_dict=half)).b


def test_easyscale_entry_counts_when_both_have_it(tmp_path):
    stock = checkpoint(tmp_path / "a.ckpt")
    one, two = (checkpoint(tmp_path / f"{n}.ckpt", easyscale={"num_ests": n}) for n in (4, 2))
    assert compare(stock, one) is None
    assert compare(one, two).what == "easyscale.num_ests"


def test_unusable_input_ends_in_one_line_and_status_2(tmp_path, capsys):
    record, ckpt = make(tmp_path / "record"), checkpoint(tmp_path / "a.ckpt")
    (tmp_path / "cut.ckpt").write_bytes(ckpt.read_bytes()[:500])
    (tmp_path / "empty").mkdir()
    torch.save([1], tmp_path / "list.ckpt")
    torch.save({"something": 1}, tmp_path / "other.ckpt")
    for a, b, message in [
        (record, tmp_path / "nowhere", "does not exist"),
        (record, tmp_path / "empty", "holds no run record"),
        (record, ckpt, "one input is a run record, the other a checkpoint"),
        (ckpt, tmp_path / "cut.ckpt", "cannot be loaded"),
        (ckpt, tmp_path / "list.ckpt", "holds a list"),
        (tmp_path / "other.ckpt", tmp_path / "other.ckpt", "looks like a Lightning checkpoint"),
    ]:
        assert main([str(a), str(b)]) == 2
        err = capsys.readouterr().err
        assert err.startswith("cannot compare: ")
        assert message in err
        assert err.count("\n") == 1
    assert main([str(ckpt), str(ckpt), "--sections", "nothing"]) == 2
    assert main([str(record), str(record), "--sections", "loops"]) == 2


def test_module_runs_as_a_command(tmp_path):
    a = make(tmp_path / "a")
    done = subprocess.run(
        [sys.executable, "-m", "lightning_easyscale.compare", str(a), str(a)],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("bitwise equal (4 steps x 2 ESTs")
