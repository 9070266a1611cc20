"""Machine code of the GPU kernels, cross-compiled: instructions per weight, spills, tensor cores."""

from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import torch

from benchmarks import _gates_rows
from benchmarks._gates import Case, Row, compile_around, variant_of
from benchmarks._gates_rows import Rows, read_rows
from benchmarks.static_gates import table, tables_replaced
from tests.targets.interpreted import needs_triton

HELD = [
    ("int4g128", 1), ("int4g128", 16), ("int4g128", 64), ("int4g64z", 16), ("int4g128z", 64), ("int4g32", 64),
    ("nf4g64", 16), ("mxfp4", 16),
]  # fmt: skip


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize(("spec", "rows"), HELD)
def test_the_gates_hold(spec, rows, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    row = variant_of(Case(spec, torch.float16, rows, capability)).measure()
    assert row.failures == ()
    assert row.matrices.startswith("HMMA" if capability == 80 else ("HGMMA", "HMMA"))


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
@pytest.mark.parametrize("spec", ["int4g32", "int4g64z"])
def test_the_gates_hold_in_bfloat16(spec, capability, monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert variant_of(Case(spec, torch.bfloat16, 16, capability)).measure().failures == ()


@needs_triton
@pytest.mark.slow
def test_inputs_of_8_bits_use_their_tensor_cores(monkeypatch):
    monkeypatch.setenv("TRITON_DEFAULT_FP_FUSION", "1")
    assert variant_of(Case("int8", torch.float16, 64, 90, "int8-token")).measure().matrices.startswith("IGMMA")
    assert variant_of(Case("int4g128", torch.float16, 16, 80, "int8-token")).measure().matrices.startswith("IMMA")
    assert variant_of(Case("fp8e4m3", torch.float16, 64, 90, "fp8e4m3-token")).measure().matrices.startswith("QGMMA")


@needs_triton
@pytest.mark.slow
@pytest.mark.parametrize(("spec", "act"), [("int4g64z", "float"), ("e8p3", "float"), ("int4g64f", "int8-token")])
def test_the_kernels_around_the_product_compile(spec, act):
    compile_around(spec, act, ("rms_norm:1e-6", "order"), ("bias", "gate_silu", "add"), 90)


@dataclass
class Counted:
    """In place of a variant: what would be compiled is told by `key`."""

    case: Case
    key: str
    measured: list[str]

    def slow(self, per_weight):
        return ("3.5 instructions per weight",) if self.case.rows == 64 else ()

    def crowded(self, programs):
        return ("2 programs on a processor",) if programs < 3 and self.case.rows == 8 else ()

    def measure(self):
        self.measured.append(self.key)
        dtype = str(self.case.dtype).removeprefix("torch.")
        return Row(self.case.spec, "float", dtype, f"sm_{self.case.capability}", self.case.rows, "8x128x256 w4 s4", 2.0,
                   100, 0, 1024, 2, "HMMA", (), self.key)  # fmt: skip


@pytest.fixture
def counting(monkeypatch):
    """Keys by spec, and those that were compiled."""
    pytest.importorskip("triton")  # its version is written
    keys, measured = {"int4g64": "a", "int4g64z": "b", "int4g64f": "b"}, []
    monkeypatch.setattr(_gates_rows, "variant_of", lambda case: Counted(case, keys[case.spec], measured))
    return keys, measured


def test_a_run_goes_on_where_the_file_ends(counting, tmp_path):
    keys, measured = counting
    case, path = Case("int4g64", torch.float16, 1, 80), tmp_path / "rows.json"
    first = Rows(path).row_of(case)
    assert Rows(path).row_of(case) == first and measured == ["a"]
    Rows(path).row_of(replace(case, spec="int4g64z"))  # leaves others where they are
    assert [row.spec for row in read_rows(path)] == ["int4g64", "int4g64z"]
    keys["int4g64"] = "c"
    assert Rows(path).row_of(case).variant == "c" and measured == ["a", "b", "c"]
    assert [row.variant for row in read_rows(path)] == ["c", "b"]


def test_equal_code_is_compiled_once_and_held_against_each_gate(counting, tmp_path):
    rows, case = Rows(None), Case("int4g64z", torch.float16, 16, 80)
    rows.row_of(case)
    other = rows.row_of(replace(case, spec="int4g64f", rows=64))
    assert counting[1] == ["b"]
    assert (other.spec, other.rows, other.failures) == ("int4g64f", 64, ("3.5 instructions per weight",))
    assert rows.row_of(replace(case, rows=8)).failures == ("2 programs on a processor",)


def test_the_table_marks_what_fails(counting, tmp_path):
    rows, path = Rows(tmp_path / "rows.json"), tmp_path / "rows.json"
    for count in (1, 64):
        rows.row_of(Case("int4g64", torch.float16, count, 80))
    (line,) = (line for line in table([path]) if "int4g64" in line)
    assert line.count("2.00") == 2 and line.count(" - ") == 4


def test_the_page_holds_what_was_counted():
    """`python -m benchmarks.static_gates --table benchmarks/results/static_gates_triton_* --into docs/kernels.md`"""
    root = Path(__file__).parents[2]
    files = [root / f"benchmarks/results/static_gates_triton_{version}.json" for version in ("3.9", "3.6")]
    page = (root / "docs/kernels.md").read_text()
    assert tables_replaced(page, files) == page
