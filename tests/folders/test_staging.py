import errno
import os
import shutil
import subprocess
import sys

import pytest

from ptqc.errors import CheckpointError
from ptqc.folders.staging import require_space, staged


def contents(folder):
    return sorted(path.name for path in folder.iterdir())


def make_model(folder):
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(b"old")
    return folder


def test_the_target_appears_whole_at_the_end(tmp_path):
    with staged(tmp_path / "deep" / "out") as staging:
        (staging / "x").write_text("1")
        assert not (tmp_path / "deep" / "out").exists()
    assert contents(tmp_path / "deep") == ["out"]
    assert contents(tmp_path / "deep" / "out") == ["x"]
    with staged(tmp_path / "plain") as staging:
        pass
    (tmp_path / "usual").mkdir()
    assert (tmp_path / "plain").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_nothing_is_left_when_the_body_fails(tmp_path, error):
    def fail():
        with staged(tmp_path / "out") as staging:
            (staging / "x").write_text("1")
            raise error

    with pytest.raises(type(error)):
        fail()
    assert contents(tmp_path) == []


def test_a_full_disk_is_a_checkpoint_error_that_says_what_to_do(tmp_path):
    with pytest.raises(CheckpointError, match=r"No space left.*free some space"), staged(tmp_path / "out"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert contents(tmp_path) == []


def test_an_unwritable_place_is_a_checkpoint_error(tmp_path):
    (tmp_path / "file").write_text("")
    for target in (tmp_path / "file" / "out", "/proc/ptqc-out"):
        with pytest.raises(CheckpointError, match=r"cannot write .*out"), staged(target):
            pytest.fail("the body must not run")


def test_existing_targets(tmp_path):
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "diary.txt").write_text("dear")
    model = make_model(tmp_path / "model")
    nested = make_model(tmp_path / "nested")
    (nested / "runs").mkdir()
    refused = [("file", True, "is a file"), ("notes", False, "not empty"), ("notes", True, "no model"),
               ("model", False, "not empty"), ("nested", True, "the folder runs")]  # fmt: skip
    for name, overwrite, complaint in refused:
        with pytest.raises(CheckpointError, match=complaint), staged(tmp_path / name, overwrite=overwrite):
            pytest.fail("the body must not run")
    for name in ("empty", "model"):
        with staged(tmp_path / name, overwrite=True) as staging:
            (staging / "new").write_text("1")
        assert contents(tmp_path / name) == ["new"]
    assert model.exists()
    assert contents(tmp_path) == ["empty", "file", "model", "nested", "notes"]


def test_a_failed_overwrite_keeps_the_old_model(tmp_path):
    model = make_model(tmp_path / "model")
    with pytest.raises(ValueError, match="boom"), staged(model, overwrite=True):
        raise ValueError("boom")
    assert (model / "model.safetensors").read_bytes() == b"old"
    assert contents(tmp_path) == ["model"]


KILLED = """
import os, signal, sys
from ptqc.folders.staging import staged
with staged(sys.argv[1]) as staging:
    (staging / "half").write_text("x")
    if len(sys.argv) > 2:
        print("ready", flush=True)
        sys.stdin.read()
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_leavings_of_killed_runs_are_swept_and_those_of_live_runs_are_not(tmp_path):
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path / "out")], check=False)
    assert [name.startswith(".out.ptqc-part-") for name in contents(tmp_path)] == [True]
    with subprocess.Popen(
        [sys.executable, "-c", KILLED, str(tmp_path / "out"), "wait"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as live:
        assert live.stdout.readline() == b"ready\n"
        assert len(contents(tmp_path)) == 1  # the dead one is gone, the live one is there
        with staged(tmp_path / "out"):
            assert len(contents(tmp_path)) == 2
        live.stdin.close()
    with staged(tmp_path / "out", overwrite=True):
        pass
    assert contents(tmp_path) == ["out"]


def test_a_disk_too_small_is_refused_beforehand(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 5, 1000))
    require_space(tmp_path / "new" / "out", 1000)
    with pytest.raises(CheckpointError, match=r"out would take 2\.000 GB, but only 0\.000 GB are free"):
        require_space(tmp_path / "new" / "out", 2 * 10**9)
