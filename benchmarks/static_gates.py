"""What the GPU kernels compile to, counted without a GPU: instructions per weight, registers, spills, shared memory.

    python -m benchmarks.static_gates [--quick] [--json FILE] [--seconds N] [--spec NAME ..] [--float16]
    python -m benchmarks.static_gates --table FILE ..

Every kernel variant is cross-compiled for sm_80 and sm_90 with the Triton that is installed, and its machine code is
read. A kernel that issues more instructions per weight than a processor can while memory delivers the weight cannot be
memory-bound (docs/kernels.md has the budgets). Gates that fail are marked and make the exit status 1.

With --json, variants that the file holds already are not compiled again unless their text changed; --seconds stops
after that time, and the next call goes on. --table prints what files hold as the tables of docs/kernels.md. With --amd
the kernels are compiled for gfx942 as well, in their plain form; that is a report only.
"""

import argparse
import itertools
import json
import os
import platform
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from datetime import date
from pathlib import Path

import torch

from benchmarks._gates import Case, Row, compile_plain, variant_of

SPECS = (
    "int4g128", "int4g64", "int4g32", "int4", "int4g128z", "int4g64z", "int4g64f", "int4g32m", "int8", "int8g128",
    "int6g64", "int5g64", "int3g64", "int2g64", "int1g64", "ternaryg64", "nf4g64", "mxfp4", "iq4_xs", "fp8e4m3",
    "fp8e5m2", "q2_K", "q3_K", "q4_K", "q5_K", "q6_K", "e8p", "e8p3", "e8p4",
)  # fmt: skip
EIGHT_BIT = (
    ("int8", "int8-token"), ("int8g128z", "int8-token"), ("int4g128", "int8-token"), ("int4g64f", "int8-token"),
    ("ternaryg64", "int8-token"), ("fp8e4m3", "fp8e4m3-token"), ("fp8e4m3b128x128", "fp8e4m3-token"),
)  # fmt: skip
QUICK = ("int4g128", "int4g64z", "nf4g64")
ROWS = (1, 16, 64)
EIGHT_BIT_ROWS = (16, 64, 128)


def cases(
    specs: Sequence[str], eight_bit: Sequence[tuple[str, str]], dtypes: Sequence[torch.dtype]
) -> Iterator[Case]:
    """What is compiled, in the order of the tables."""
    for dtype in dtypes:
        for spec, capability, rows in itertools.product(specs, (80, 90), ROWS):
            yield Case(spec, dtype, rows, capability)
    for (spec, act), capability, rows in itertools.product(eight_bit, (80, 90), EIGHT_BIT_ROWS):
        if capability == 90 or act == "int8-token":
            yield Case(spec, torch.float16, rows, capability, act)


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
            write_rows(self.path, sorted(self.found.values(), key=_place))


def _case_of(row: Row) -> Case:
    return Case(row.spec, getattr(torch, row.dtype), row.rows, int(row.target.removeprefix("sm_")), row.act)


def _place(row: Row) -> tuple[bool, bool, int, str, int]:
    """Where a row stands in a file and in the tables."""
    specs = [spec for spec, _ in EIGHT_BIT] if row.act != "float" else list(SPECS)
    place = specs.index(row.spec) if row.spec in specs else len(specs)
    return row.act != "float", row.dtype != "float16", place, row.target, row.rows


def read_rows(path: Path) -> list[Row]:
    """Rows of an earlier run."""
    listed = json.loads(path.read_text())["rows"] if path.exists() else []
    return [Row(**{**row, "failures": tuple(row["failures"])}) for row in listed if "variant" in row]


def write_rows(path: Path, rows: Sequence[Row]) -> None:
    """What a run found, with versions."""
    import triton

    about = {"triton": triton.__version__, "torch": torch.__version__, "date": date.today().isoformat(),
             "machine": platform.processor() or platform.machine()}  # fmt: skip
    temporary = path.with_name(f"{path.name}.{os.getpid()}")
    temporary.write_text(json.dumps({**about, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    os.replace(temporary, path)


def _amd(specs: Sequence[str]) -> Iterator[str]:
    """What becomes of the plain form on gfx942."""
    from triton.backends.compiler import GPUTarget

    for spec in specs:
        try:
            compiled = compile_plain(variant_of(Case(spec, torch.float16, 16, 90)), GPUTarget("hip", "gfx942", 64))
            yield f"{spec}: gfx942, {compiled.asm['amdgcn'].count('v_mfma')} v_mfma, {compiled.metadata.shared} B"
        except Exception as error:
            yield f"{spec}: gfx942 fails: {str(error).strip().splitlines()[-1][:160]}"


HEADER = (
    "spec            act           dtype    target tile                 i/w  regs spills shared programs tensor cores"
)


def _line(row: Row) -> str:
    failures = f"  FAILS: {'; '.join(row.failures)}" if row.failures else ""
    return (
        f"{row.spec:15s} {row.act:13s} {row.dtype:8s} {row.target:6s} {row.tile:18s} {row.per_weight:5.2f} "
        f"{row.registers:5d} {row.spills:6d} {row.shared:6d} {row.programs:8d} {row.matrices}{failures}"
    )


def table(files: Sequence[Path]) -> Iterator[str]:
    """Markdown, one row for a spec and type: instructions per weight, by target, rows and file."""
    for is_quantized, counts in ((False, ROWS), (True, EIGHT_BIT_ROWS)):
        columns = [(target, count) for target in ("sm_80", "sm_90") for count in counts]
        yield "| spec | |" + "".join(f" {target}: {count} |" for target, count in columns)
        yield "|---|---|" + "---|" * len(columns)
        found = {(row.spec, row.act, row.dtype, row.target, row.rows, i): row
                 for i, path in enumerate(files) for row in read_rows(path) if (row.act != "float") == is_quantized}
        for spec, act, dtype in dict.fromkeys(key[:3] for key in found):
            cells = []
            for target, count in columns:
                rows = [found.get((spec, act, dtype, target, count, i)) for i in range(len(files))]
                cells.append(" / ".join(_cell(row) for row in rows if row) or "-")
            yield f"| {spec} | {act if is_quantized else dtype} | {' | '.join(cells)} |"
        yield ""


def _cell(row: Row) -> str:
    text = f"{row.per_weight:.2f}"
    if row.spills:
        text += f", {row.spills} spills"
    return f"**{text}**" if row.failures else text


def main() -> None:
    """Print the rows, write JSON, fail if a gate does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float16 and three specs only")
    parser.add_argument("--float16", action="store_true", help="leave bfloat16 out")
    parser.add_argument("--json", type=Path, help="go on with this file, and write it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long")
    parser.add_argument("--spec", nargs="+", help="these specs only")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942 too")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print what these files hold")
    given = parser.parse_args()
    if given.table:
        print("\n".join(table(given.table)))
        return
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    begun = time.monotonic()
    specs = tuple(given.spec or (QUICK if given.quick else SPECS))
    dtypes = (torch.float16,) if given.quick or given.float16 else (torch.float16, torch.bfloat16)
    print(f"Triton {triton.__version__}, torch {torch.__version__}")
    print(HEADER)
    known = Rows(given.json)
    rows: list[Row] = []
    eight_bit = [pair for pair in EIGHT_BIT if not given.quick and (not given.spec or pair[0] in given.spec)]
    asked = list(cases(specs, eight_bit, dtypes))
    for case in asked:
        if time.monotonic() - begun > given.seconds:
            break
        rows.append(known.row_of(case))
        print(_line(rows[-1]), flush=True)
    for line in _amd(specs) if given.amd else ():
        print(line)
    print(f"{len(rows)} of {len(asked)} variants, {sum(bool(row.failures) for row in rows)} fail")
    sys.exit(1 if any(row.failures for row in rows) or len(rows) < len(asked) else 0)


if __name__ == "__main__":
    main()
