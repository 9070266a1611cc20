"""What the GPU kernels compile to, counted without a GPU: instructions per weight, registers, spills, shared memory.

    python -m benchmarks.static_gates [--quick] [--json FILE] [--seconds N] [--spec NAME ..] [--float16]
    python -m benchmarks.static_gates --attention [--json FILE]
    python -m benchmarks.static_gates --table FILE .. [--into docs/kernels.md]

Every kernel variant is cross-compiled for sm_80 and sm_90 with the Triton that is installed, and its machine code is
read. A kernel that issues more instructions per weight than a processor can while memory delivers the weight cannot be
memory-bound (docs/kernels.md has the budgets). Gates that fail are marked and make the exit status 1.

With --json, variants that the file holds already are not compiled again unless their text changed; --seconds stops
after that time, and the next call goes on. --table prints what files hold as the tables of docs/kernels.md, or puts
them there with --into. With --amd the kernels are compiled for gfx942 as well, in their plain form; that is a report
only. --attention compiles attention of few queries instead.
"""

import argparse
import itertools
import os
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch

from benchmarks._attention_gates import ATTENTION_CASES, measure_attention
from benchmarks._gates import Case, Row, compile_plain, variant_of
from benchmarks._gates_rows import Rows, read_rows, write_rows

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
_BEGIN, _END = "<!-- static_gates: tables -->", "<!-- static_gates: end -->"
EIGHT_BIT_ROWS = (16, 64, 128)


def cases(specs: Sequence[str], eight_bit: Sequence[tuple[str, str]], dtypes: Sequence[torch.dtype]) -> Iterator[Case]:
    """What is compiled, in the order of the tables."""
    for dtype in dtypes:
        for spec, capability, rows in itertools.product(specs, (80, 90), ROWS):
            yield Case(spec, dtype, rows, capability)
    for (spec, act), capability, rows in itertools.product(eight_bit, (80, 90), EIGHT_BIT_ROWS):
        if capability == 90 or act == "int8-token":
            yield Case(spec, torch.float16, rows, capability, act)


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
        found = {
            (row.spec, row.act, row.dtype, row.target, row.rows, i): row
            for i, path in enumerate(files)
            for row in read_rows(path)
            if (row.act != "float") == is_quantized
        }
        for spec, act, dtype in sorted(dict.fromkeys(key[:3] for key in found), key=lambda key: _place(*key)):
            cells = []
            for target, count in columns:
                rows = [found.get((spec, act, dtype, target, count, i)) for i in range(len(files))]
                cells.append(" / ".join(_cell(row) for row in rows if row) or "-")
            yield f"| {spec} | {act if is_quantized else dtype} | {' | '.join(cells)} |"
        yield ""


def _place(spec: str, act: str, dtype: str) -> tuple[bool, int]:
    specs = list(SPECS) if act == "float" else [name for name, _ in EIGHT_BIT]
    return dtype != "float16", specs.index(spec) if spec in specs else len(specs)


def tables_replaced(text: str, files: Sequence[Path]) -> str:
    """A page with these tables between the marks in it."""
    before, _, rest = text.partition(_BEGIN)
    _, _, after = rest.partition(_END)
    assert after, f"the page has no marks {_BEGIN} {_END}"
    return "\n".join([before + _BEGIN, *table(files), _END + after])


def _cell(row: Row) -> str:
    text = f"{row.per_weight:.2f}"
    if row.spills:
        text += f", {row.spills} spills"
    return f"**{text}**" if row.failures else text


def attention(path: Path | None) -> int:
    """Print Markdown, a row for every case of attention, and write JSON. Returns how many fail."""
    print("| case | target | tile | instructions for a key | registers | shared KB | programs | tensor cores | fails |")
    print("|" + "---|" * 9)
    rows = []
    for case, capability in itertools.product(ATTENTION_CASES, (80, 90)):
        rows.append(row := measure_attention(case, capability))
        numbers = f"{row.loop} | {row.registers} | {row.shared / 1024:.0f} | {row.programs} | {row.matrices}"
        print(f"| {row.case} | {row.target} | {row.tile} | {numbers} | {'; '.join(row.failures)} |", flush=True)
    if path:
        write_rows(path, rows)
    return sum(bool(row.failures) for row in rows)


def main() -> None:
    """Print the rows, write JSON, fail if a gate does."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="float16 and three specs only")
    parser.add_argument("--float16", action="store_true", help="leave bfloat16 out")
    parser.add_argument("--json", type=Path, help="go on with this file, and write it")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="stop after about so long")
    parser.add_argument("--spec", nargs="+", help="these specs only")
    parser.add_argument("--attention", action="store_true", help="attention of few queries instead of products")
    parser.add_argument("--amd", action="store_true", help="compile for gfx942 too")
    parser.add_argument("--table", nargs="+", type=Path, metavar="FILE", help="print what these files hold")
    parser.add_argument("--into", type=Path, metavar="PAGE", help="with --table: put it between the marks of a page")
    given = parser.parse_args()
    if given.table and given.into:
        given.into.write_text(tables_replaced(given.into.read_text(), given.table))
        return
    if given.table:
        print("\n".join(table(given.table)))
        return
    os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "1")
    import triton

    if given.attention:
        print(f"Triton {triton.__version__}, torch {torch.__version__}")
        sys.exit(1 if attention(given.json) else 0)
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
