"""Many architectures, a few per process: what one process does not finish is tried once more, one by one.

A benchmark that is called with `--worker KEY ...` prints one line "ROW {json}" per result; `run` collects them, keeps
finished ones in a JSON-lines file, and skips those when it is started again.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

CHUNK = 6  # architectures per process: importing transformers takes longer than building a tiny model


def all_keys():
    """Every architecture of the zoo."""
    lines = (Path(__file__).parent / "zoo" / "zoo_open.txt").read_text().splitlines()
    return [line.split("\t")[0] for line in lines if line.strip()]


def rows_of(command: Sequence[str], keys: Sequence[str], timeout: float) -> list[dict]:
    """The rows that `python -m command... --worker keys...` prints; a row with "failure" for what it did not finish."""
    whole = [sys.executable, "-m", *command, "--worker", *keys]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1"}
    try:
        done = subprocess.run(whole, capture_output=True, text=True, timeout=timeout * len(keys), env=environment)
        output, failure = done.stdout, (done.stderr.strip().splitlines() or ["no output"])[-1]
    except subprocess.TimeoutExpired as expired:
        output, failure = (expired.stdout or b"").decode(), f"more than {timeout} s"
    rows = [json.loads(line[4:]) for line in output.splitlines() if line.startswith("ROW ")]
    missing = [key for key in keys if key not in {row["arch"] for row in rows}]
    if missing and len(keys) > 1:
        return rows + [row for key in missing for row in rows_of(command, [key], timeout)]
    return rows + [{"arch": key, "failure": failure} for key in missing]


def run(
    command: Sequence[str],
    keys: Sequence[str],
    timeout: float,
    workers: int,
    journal: Path | None,
    show: Callable[[dict], str],
) -> list[dict]:
    """All rows of all keys, those in the journal first. show: one line for a finished row."""
    rows = [json.loads(line) for line in journal.read_text().splitlines()] if journal and journal.exists() else []
    todo = [key for key in keys if key not in {row["arch"] for row in rows}]
    chunks = [todo[at : at + CHUNK] for at in range(0, len(todo), CHUNK)]
    with ThreadPoolExecutor(workers) as pool:
        for new in pool.map(lambda chunk: rows_of(command, chunk, timeout), chunks):
            rows += new
            for row in new:
                print(show(row)[:200], flush=True)
            if journal:
                with journal.open("a") as file:
                    file.writelines(json.dumps(row) + "\n" for row in new)
    return rows
