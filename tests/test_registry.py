"""Registries find files, entry points and direct registrations."""

import pytest

from ptqc.errors import UnknownNameError
from ptqc.methods import METHODS
from ptqc.registry import Registry


def test_files_are_names():
    assert {"rtn", "hqq", "nf4", "fp4", "fp8", "int8"} <= set(METHODS.names())
    assert METHODS.get("rtn").__name__ == "RoundToNearest"


def test_unknown_names_answer_with_the_known_ones():
    with pytest.raises(UnknownNameError, match=r"no method is called 'hqqq'; known: .*hqq"):
        METHODS.get("hqqq")


def test_registering_twice_is_an_error():
    registry = Registry("thing", "ptqc.passes.methods")
    registry.register("x")(int)
    registry.register("x")(int)
    with pytest.raises(ValueError, match="registered twice"):
        registry.register("x")(str)


def test_an_entry_point_is_a_name(tmp_path, monkeypatch):
    (tmp_path / "plugin_of_a_stranger.py").write_text("class Stranger: pass\n")
    info = tmp_path / "stranger-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: stranger\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[ptqc.passes.methods]\nstranger = plugin_of_a_stranger:Stranger\n")
    monkeypatch.syspath_prepend(str(tmp_path))
    registry = Registry("method", "ptqc.passes.methods")
    assert "stranger" in registry.names()
    assert registry.get("stranger").__name__ == "Stranger"
