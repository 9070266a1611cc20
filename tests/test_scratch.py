"""Hidden places beside a target: swept when nobody holds them."""

import os

from ptqc.scratch import hidden, hold, shortage, sweep


def test_parts_of_dead_runs_are_swept_and_nothing_else(tmp_path):
    target = tmp_path / "model.gguf"
    dead, alive, old, other = hidden(target), hidden(target), hidden(target, "old"), hidden(tmp_path / "other.gguf")
    for folder in (dead, alive, old, other):
        folder.mkdir()
        (folder / "x").write_text("1")
    lock = hold(alive)
    assert lock is not None and hold(alive) is None
    sweep(target)
    assert sorted(tmp_path.iterdir()) == sorted([alive, old, other])
    os.close(lock)
    sweep(target)
    assert sorted(tmp_path.iterdir()) == sorted([old, other])


def test_a_shortage_says_how_much_is_missing_and_where(tmp_path):
    assert shortage(tmp_path / "deep" / "file", 1000) is None
    said = shortage(tmp_path / "deep" / "file", 10**18)
    assert said is not None and "would take 1000000000.000 GB" in said and f"free in {tmp_path}" in said


def test_a_shortage_names_the_place_and_not_where_it_is_written_until_then(tmp_path):
    target = tmp_path / "model.gguf"
    for path in (target, hidden(target) / "model.gguf"):
        told = shortage(path, 1 << 60)
        assert told is not None and told.startswith(f"{target} would take") and "ptqc-part" not in told
    assert shortage(target, 1) is None
