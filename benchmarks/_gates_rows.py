"""Rows of `benchmarks.static_gates` and the file they are kept in."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks._attention_gates import AttentionRow
from benchmarks._gates import Case, Row, variant_of

__all__ = ["Rows", "read_rows", "write_rows"]


class Rows:
    """What was counted, by case; the file it is kept in, if any, is written with every row.

    A row of a file counts as long as its code would be compiled again; another case of equal code is not compiled.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self.found = {_case_of(row): row for row in (read_rows(path) if path else [])}
        self.counted = {row.variant: row for row in self.found.values()}

    def row_of(self, case: Case) -> Row:
        """The row of a case, compiled unless a known one is of the same code."""
        variant = variant_of(case)
        known = self.counted.get(variant.key)
        if known is None:
            row = variant.measure()
        else:
            others = [why for why in known.failures if "per weight" not in why and "on a processor" not in why]
            failures = (*variant.slow(known.per_weight), *variant.crowded(known.programs), *others)
            row = replace(known, spec=case.spec, act=case.act, rows=case.rows, failures=failures)
        self.counted[row.variant] = row
        if self.found.get(case) != row:
            self.found[case] = row
            self._write()
        return row

    def _write(self) -> None:
        if self.path:
            write_rows(self.path, list(self.found.values()))


def _case_of(row: Row) -> Case:
    return Case(row.spec, getattr(torch, row.dtype), row.rows, int(row.target.removeprefix("sm_")), row.act)


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    listed = json.loads(path.read_text())["rows"] if path.exists() else []
    return [Row(**{**row, "failures": tuple(row["failures"])}) for row in listed if "variant" in row]


def write_rows(path: Path, rows: Sequence[Row | AttentionRow]) -> None:
    """What a run found, with versions."""
    import triton

    about = {"triton": triton.__version__, "torch": torch.__version__, "date": date.today().isoformat(),
             "machine": platform.processor() or platform.machine()}  # fmt: skip
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    os.replace(temporary, path)
