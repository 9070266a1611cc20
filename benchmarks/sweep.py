"""Runs a check over the architectures of `benchmarks/zoo`, a few to a process, with a journal that resumes.

A benchmark that sweeps calls `sweep` from its main, with the name of its module and what makes rows:

    sweep("benchmarks.folds", lambda key, arguments: [row, ...], parser)

Each row is a dict with "arch"; what a process did not finish within the time is run again one by one, and becomes a
row with "failure" if that fails too. Finished rows are kept in the JSON-lines file beside --json.
"""

import json
import os
import platform
import random
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 6
"""Architectures per process: importing transformers takes longer than building a tiny model."""
_ZOO = Path(__file__).parent / "zoo" / "zoo_open.txt"


def sweep(module, check, parser):
    """Parse the command line and return (rows, arguments); None in a worker process, which prints its rows instead.

    check(key, arguments) makes the rows of one architecture. parser: an ArgumentParser with the benchmark's options.
    """
    parser.add_argument("--only", nargs="*", help="these architectures, as in causal/gpt2")
    parser.add_argument("--sample", type=int, help="only so many architectures, drawn at random (seed 0)")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="*", help="run these here and print rows (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.worker:
        for key in arguments.worker:
            for row in check(key, arguments):
                print("ROW " + json.dumps(row), flush=True)
        return None
    return _all_rows(module, arguments), arguments


def _all_rows(module, arguments):
    keys = arguments.only or [line.split("\t")[0] for line in _ZOO.read_text().splitlines() if line.strip()]
    if arguments.sample:
        keys = random.Random(0).sample(keys, arguments.sample)
    journal = arguments.json.with_suffix(".jsonl") if arguments.json else None
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal and journal.exists() else []
    todo = [key for key in keys if key not in {row["arch"] for row in rows}]
    chunks = [todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK)]
    finished = 0
    with ThreadPoolExecutor(arguments.workers) as pool:
        for new in pool.map(lambda chunk: _apart(module, chunk, arguments), chunks):
            rows += new
            finished += len({row["arch"] for row in new})
            print(f"[{finished}/{len(todo)}] {new[-1]['arch']}", file=sys.stderr, flush=True)
            if journal:
                with journal.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    return rows


def _apart(module, keys, arguments):
    """The rows of several architectures from one process of their own; those it did not finish once more, alone."""
    options = _passed_on(arguments)
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    command = [sys.executable, "-m", module, *options, "--worker", *keys]
    try:
        limit = arguments.timeout * len(keys)
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit, env=environment)
        output, failure = done.stdout, (done.stderr.strip().splitlines() or ["no output"])[-1]
        ended = done.returncode == 0
    except subprocess.TimeoutExpired as expired:
        output, failure, ended = (expired.stdout or b"").decode(), f"more than {arguments.timeout} s", False
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    if ended:
        return rows
    seen = list(dict.fromkeys(row["arch"] for row in rows))
    whole = seen[:-1]  # the last one may lack rows
    rows = [row for row in rows if row["arch"] in whole]
    missing = [key for key in keys if key not in whole]
    if len(keys) > 1:
        return rows + [row for key in missing for row in _apart(module, [key], arguments)]
    return [{"arch": key, "failure": failure[:600]} for key in missing]


def _passed_on(arguments):
    """The benchmark's own options as words of a command line."""
    own = {"only", "sample", "workers", "timeout", "json", "worker"}
    words = []
    for name, value in vars(arguments).items():
        if name not in own and value not in (None, False):
            words += [f"--{name.replace('_', '-')}"] + ([] if value is True else [str(value)])
    return words


def by_method(rows, methods):
    """The rows; a failure of a whole architecture becomes a row for each method."""
    return [new for row in rows for new in ([row] if "method" in row else [row | {"method": m} for m in methods])]


def write(path, result):
    """Write a result with versions, date and machine."""
    import torch
    import transformers

    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    result = result | {"versions": versions, "date": time.strftime("%Y-%m-%d"), "machine": platform.machine()}
    path.write_text(json.dumps(result, indent=1) + "\n")
