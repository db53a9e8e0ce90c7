"""Tile sizes: how they are chosen, measured and kept on disk. No GPU and no Triton needed."""

from __future__ import annotations

import json
import multiprocessing
import os
import warnings
from pathlib import Path

import pytest

from lightning_easyscale.kernels import tile_cache, tiles, tuning
from lightning_easyscale.kernels.tile_cache import TileCache
from lightning_easyscale.kernels.tiles import CANDIDATES, Tiles, pick, shape_class

ALLOWED = {tuple(t) for t in CANDIDATES}
FIRST, SECOND = (tuple(t) for t in CANDIDATES[:2])
DEVICE = {"device": "H200", "format": "2"}


def opened(path: Path, made_for: dict[str, str] = DEVICE) -> tuple[TileCache, list[str]]:
    warned: list[str] = []
    return TileCache(path, made_for, ALLOWED, warned.append), warned


@pytest.fixture
def kept(tmp_path, monkeypatch):
    """A device whose measurements are kept in a folder of the test."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(tiles.torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tiles.torch.cuda, "get_device_name", lambda: "a device")
    monkeypatch.setattr(tuning.torch.cuda, "is_current_stream_capturing", lambda: False)
    tiles._cache_of.cache_clear()
    yield tmp_path / "lightning_easyscale"
    tiles._cache_of.cache_clear()


def test_what_was_found_is_found_again(tmp_path):
    path = tmp_path / "deep" / "tiles.json"
    cache, warned = opened(path)
    assert cache.get("matmul 64 64 64 1 1") is None
    cache.put("matmul 64 64 64 1 1", FIRST)
    cache.put("forward 64 64 64 1 9", SECOND)
    again, warned_again = opened(path)
    assert again.get("matmul 64 64 64 1 1") == FIRST
    assert again.get("forward 64 64 64 1 9") == SECOND
    assert warned + warned_again == []
    assert [p.name for p in path.parent.iterdir() if p.suffix not in (".json", ".lock")] == []


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "null", '{"tiles": {}}', json.dumps({"made_for": DEVICE, "tiles": [1]})]
    + [json.dumps({"made_for": DEVICE, "tiles": {"matmul": sizes}}) for sizes in (None, 7, [64], [64, 64, 24, 4, 3, 1])]
    # Segments of 256 would not be cut by steps of 512: bits would change.
    + [json.dumps({"made_for": DEVICE, "tiles": {"matmul": [64, 64, 512, 4, 3, 1024]}})]
    + [json.dumps({"made_for": {**DEVICE, "device": "H100"}, "tiles": {"matmul": FIRST}})],
)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_replaced(tmp_path, text):
    path = tmp_path / "tiles.json"
    path.write_text(text)
    cache, warned = opened(path)
    assert cache.get("matmul") is None
    assert len(warned) == 1
    assert "ignored" in warned[0]
    assert "HINT" in warned[0]
    cache.put("matmul", SECOND)
    again, warned = opened(path)
    assert again.get("matmul") == SECOND
    assert warned == []


def test_a_file_of_no_text_is_ignored(tmp_path):
    path = tmp_path / "tiles.json"
    path.write_bytes(b"\xff\xfe\x00")
    cache, warned = opened(path)
    assert cache.get("matmul") is None
    assert len(warned) == 1


def test_where_nothing_can_be_written_the_process_keeps_what_it_found(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("in the way of a folder")
    cache, warned = opened(blocked / "tiles.json")
    warned.clear()
    cache.put("matmul", FIRST)
    assert cache.get("matmul") == FIRST
    assert len(warned) == 1
    assert "not kept" in warned[0]


def _put(path: Path, worker: int) -> None:
    for i in range(20):
        opened(path)[0].put(f"matmul {worker} {i}", FIRST)


def test_processes_that_write_at_once_lose_nothing(tmp_path):
    path = tmp_path / "tiles.json"
    context = multiprocessing.get_context("fork")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a fork beside threads
        workers = [context.Process(target=_put, args=(path, worker)) for worker in range(4)]
        for process in workers:
            process.start()
    for process in workers:
        process.join(120)
    assert [process.exitcode for process in workers] == [0] * 4
    cache, warned = opened(path)
    assert all(cache.get(f"matmul {worker} {i}") == FIRST for worker in range(4) for i in range(20))
    assert warned == []


def test_a_file_belongs_to_one_device_and_to_the_versions_that_ran(kept, monkeypatch):
    def name(device: str = "a device") -> str:
        return TileCache.of_device(device, ALLOWED, warnings.warn)._path.name

    names = {name(), name("another")}
    monkeypatch.setattr(tile_cache.torch, "__version__", "9.9")
    names.add(name())
    monkeypatch.setattr(tile_cache, "version", lambda _: "9.9.9")
    names.add(name())
    monkeypatch.setattr("lightning_easyscale.kernels.FORMAT_VERSION", 99)
    names.add(name())
    assert len(names) == 5


def test_the_built_in_choice_gives_way_to_what_was_measured_and_both_to_force(kept):
    shape = (100, 70, 300)
    built_in = pick("matmul", *shape)
    other = next(t for t in CANDIDATES if t != built_in)
    tiles.tile_cache().put(shape_class("matmul", *shape), tuple(other))
    tiles._cache_of.cache_clear()
    assert pick("matmul", *shape) == other
    assert pick("matmul", 128, 128, 512) == other  # of the same class
    assert pick("matmul", 129, 70, 300) == built_in
    assert pick("matmul", *shape, batch=2) == built_in
    with tiles.tiles(Tiles(16, 16, 16)):
        assert pick("matmul", *shape) == Tiles(16, 16, 16)


def test_a_class_is_measured_once(kept, monkeypatch):
    measured: list[Tiles] = []
    monkeypatch.setattr(tuning, "_seconds", lambda choice, run: measured.append(choice) or float(len(measured) != 3))
    for _ in range(2):
        tuning.tune(("matmul", 100, 70, 300), lambda: None)
    assert len(measured) == len(set(measured)) > 3
    assert pick("matmul", 100, 70, 300) == measured[2]
    assert len(list(kept.glob("tiles-*.json"))) == 1
    with tiles.tiles(Tiles()):
        tuning.tune(("matmul", 1000, 70, 300), lambda: None)
    assert len(list(kept.glob("tiles-*.json"))) == 1
    assert pick("matmul", 1000, 70, 300) != measured[2]


def test_the_built_in_choice_stays_where_another_gains_little():
    choices = list(CANDIDATES[:3])
    assert tuning.fastest(choices, lambda t: 1.0 if t == choices[0] else 0.98) == choices[0]
    assert tuning.fastest(choices, lambda t: 0.5 if t == choices[2] else 1.0) == choices[2]


def test_tiles_that_do_not_fit_a_device_are_left_out():
    class OutOfResources(Exception):
        pass

    def seconds(choice: Tiles) -> float:
        if choice == CANDIDATES[1]:
            return 1.0
        raise OutOfResources

    assert tuning.fastest(list(CANDIDATES[:3]), seconds) == CANDIDATES[1]
    with pytest.raises(ValueError, match="other"):
        tuning.fastest(list(CANDIDATES[:3]), lambda _: (_ for _ in ()).throw(ValueError("other")))


def test_candidates_keep_segments_whole_and_start_with_the_built_in_choice():
    assert all(256 % t.k == 0 and t.k >= 16 and t.m >= 16 and t.n >= 16 for t in CANDIDATES)
    assert len(set(CANDIDATES)) == len(CANDIDATES)
    first = pick("matmul", 20, 40)
    assert tuning.candidates(first, 20, 40)[0] == first
    assert all(t.m <= 32 and t.n <= 64 for t in tuning.candidates(first, 20, 40)[1:])
    shapes = [(m, n) for m in (1, 33, 65, 5000) for n in (1, 65, 5000, 10**6)]
    kinds = ("matmul", "forward", "input_gradient", "weight_gradient")
    assert {pick(kind, m, n) for kind in kinds for m, n in shapes} <= set(CANDIDATES)


def test_measuring_is_asked_for_by_a_variable_or_a_block():
    assert tuning.wanted == (os.environ.get("EASYSCALE_TUNE", "0") not in ("", "0"))
    with tuning.measuring():
        assert tuning.wanted
    assert not tuning.wanted or "EASYSCALE_TUNE" in os.environ
