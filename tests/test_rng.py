"""ESTs that take turns in one process draw what each would have drawn in a process of its own."""

import io
import random
import types

import numpy as np
import pytest
import torch

from lightning_easyscale import rng
from lightning_easyscale.rng import Generators, find_module_generators, state_of_parts

CPU = [torch.device("cpu")]


@pytest.fixture(autouse=True)
def _restore_generators():
    states = torch.get_rng_state(), random.getstate(), np.random.get_bit_generator(), np.random.get_state()
    yield
    torch.set_rng_state(states[0])
    random.setstate(states[1])
    np.random.set_bit_generator(states[2])
    np.random.set_state(states[3])


def seed(value):
    torch.manual_seed(value)
    random.seed(value)
    np.random.seed(value)


def draw(count=1):
    """One number from each generator; odd counts of normal draws leave a kept number in each."""
    normal = [(random.gauss(0, 1), float(np.random.randn()), torch.randn(1).item()) for _ in range(count)]
    return normal, random.random(), float(np.random.rand()), torch.rand(1).item()


def alone(value, counts):
    seed(value)
    return [draw(count) for count in counts]


@pytest.fixture(params=[True, False], ids=["as bytes", "as objects"])
def python_words(request, monkeypatch):
    """The words of Python's generator are found where CPython keeps them, or are not."""
    if request.param:
        assert rng._PYTHON_MEMORY is not None
    else:
        monkeypatch.setattr(rng, "_PYTHON_MEMORY", None)


@pytest.mark.usefixtures("python_words")
def test_the_state_of_pythons_generator_is_the_one_python_gives():
    random.seed(3)
    random.gauss(0, 1)
    ours, theirs = Generators(CPU), random.getstate()
    saved = ours.state_dict()
    assert rng._from_plain(saved["python"]) == theirs
    assert rng._from_plain(state_of_parts(ours.parts())["python"]) == theirs
    random.seed(4)
    other = Generators(CPU)
    other.load_state_dict(saved)
    other.install()
    assert random.getstate() == theirs


@pytest.mark.usefixtures("python_words")
@pytest.mark.parametrize("seeds", [(1, 2, 3), (5, 5, 5)], ids=["different", "equal"])
def test_interleaved_ests_draw_what_they_draw_alone(seeds):
    counts = [[1, 3, 0, 2, 1], [2, 1, 1, 0, 5], [0, 0, 1, 1, 1]]
    expected = [alone(*pair) for pair in zip(seeds, counts, strict=True)]
    ests = []
    for value in seeds:
        seed(value)
        ests.append(Generators(CPU))
    drawn = [[], [], []]
    for turn in range(5):
        for rank, est in enumerate(ests):
            est.install()
            drawn[rank].append(draw(counts[rank][turn]))
            est.capture()
    assert drawn == expected


def test_a_seed_inside_an_est_stays_inside():
    seed(1)
    first, second = Generators(CPU), Generators(CPU)
    expected = draw(3)
    first.install()
    seed(9)
    first.capture()
    second.install()
    assert draw(3) == expected
    second.capture()
    first.install()
    assert draw(3) == alone(9, [3])[0]


def test_a_normal_number_kept_by_numpy_alone_is_noticed():
    seed(1)
    expected = [float(np.random.randn()) for _ in range(6)]
    seed(1)
    own, other = Generators(CPU), Generators(CPU)
    drawn = []
    for _ in range(6):
        own.install()
        drawn.append(float(np.random.randn()))
        own.capture()
        other.install()
        np.random.randn()
        other.capture()
    assert drawn == expected


@pytest.mark.parametrize("kind", [np.random.MT19937, np.random.PCG64, np.random.Philox])
def test_states_survive_a_file(kind):
    seed(3)
    np.random.set_bit_generator(kind(7))
    user = types.ModuleType("user")
    user.rng = np.random.default_rng(4)
    est = Generators(CPU, extra=find_module_generators([user]))
    est.install()
    draw(1)
    user.rng.random()
    est.capture()
    file = io.BytesIO()
    torch.save(est.state_dict(), file)
    expected = draw(3), user.rng.random()
    file.seek(0)

    seed(99)
    user.rng = np.random.default_rng(0)
    resumed = Generators(CPU, extra=find_module_generators([user]))
    resumed.load_state_dict(torch.load(file, weights_only=True))
    resumed.install()
    assert (draw(3), user.rng.random()) == expected


def test_a_state_is_a_copy():
    est = Generators(CPU)
    est.install()
    state = est.state_dict()
    draw(1)
    est.capture()
    expected = est.state_dict()
    assert not torch.equal(state["torch"], expected["torch"])
    assert state["numpy"] != expected["numpy"]
    est.load_state_dict(state)
    draw(5)
    est.install()
    draw(1)
    est.capture()
    assert est.state_dict()["numpy"] == expected["numpy"]
    assert est.state_dict()["python"] == expected["python"]
    assert torch.equal(est.state_dict()["torch"], expected["torch"])


def test_module_generators_are_found_and_swapped():
    user = types.ModuleType("user")
    user.a, user.b = random.Random(1), np.random.default_rng(1)
    user.c, user.d = torch.Generator().manual_seed(1), np.random.RandomState(1)
    user.again, user.system, user.shuffle, user.number = user.a, random.SystemRandom(), random.shuffle, 3
    user.instance, user.default = random._inst, torch.default_generator
    found = find_module_generators([user])
    assert found == {"user.a": user.a, "user.b": user.b, "user.c": user.c, "user.d": user.d}

    def numbers():
        return [user.a.gauss(0, 1), user.b.random(), torch.rand(1, generator=user.c).item(), user.d.randn()]

    first, second = Generators(CPU, extra=found), Generators(CPU, extra=found)
    first.install()
    expected = [numbers(), numbers()]
    first.capture()
    second.install()
    drawn = [numbers()]
    second.capture()
    first.install()
    first.capture()
    second.install()
    assert [*drawn, numbers()] == expected


def test_other_devices_are_refused():
    with pytest.raises(ValueError, match=r"`devices=\['meta'\]` has generators we cannot swap"):
        Generators([torch.device("meta")])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_generators_are_swapped_and_saved():
    devices = [torch.device("cuda", 0)]

    def numbers():
        return torch.rand(3, device="cuda").tolist()

    torch.cuda.manual_seed(5)
    expected = [numbers() for _ in range(3)]
    torch.cuda.manual_seed(5)
    first, second = Generators(devices), Generators(devices)
    first.install()
    drawn = [numbers()]
    first.capture()
    second.install()
    assert numbers() == expected[0]
    second.capture()
    first.install()
    drawn.append(numbers())
    first.capture()
    state = first.state_dict()
    drawn.append(numbers())
    assert drawn == expected
    second.install()
    assert numbers() == expected[1]
    third = Generators(devices)
    third.load_state_dict(state)
    third.install()
    assert numbers() == expected[2]
    second.install()
    assert numbers() == expected[2]
