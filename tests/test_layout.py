"""The three rooms are reached through two tracked links, and under no other name."""

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
ROOMS = ("passes", "codegen")


@pytest.mark.parametrize("room", ROOMS)
def test_room_is_linked(room):
    assert (ROOT / "ptqc" / room).resolve() == ROOT / room


@pytest.mark.parametrize("room", ROOMS)
def test_room_refuses_its_short_name(room):
    code = f"import sys; sys.path.insert(0, {str(ROOT)!r}); import {room}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd="/")
    assert f"import this package as ptqc.{room}" in done.stderr


def test_every_public_name_exists():
    for path in sorted((ROOT / "ptqc").glob("*.py")):
        if "__all__" in path.read_text():
            module = importlib.import_module("ptqc" if path.stem == "__init__" else f"ptqc.{path.stem}")
            missing = [name for name in module.__all__ if not hasattr(module, name)]
            assert not missing, (path.name, missing)


def test_every_source_has_a_docstring():
    sources = [path for room in ("ptqc", *ROOMS) for path in (ROOT / room).glob("**/*.py")]
    assert len(sources) > 30
    bare = [path.name for path in sources if not ast.get_docstring(ast.parse(path.read_text()))]
    assert not bare
