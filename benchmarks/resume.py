"""A calibrated run that is killed with SIGKILL again and again writes the bytes of one that was left alone.

Writes a random Llama-shaped model of two layers, quantizes it once undisturbed and once killed at random moments, each
time started again with the same arguments, and compares every file. Says how many pieces each start found finished.

    python -m benchmarks.resume [--method gptq] [--kills 3] [--layers 2] [--seed 0] [--json FILE]

With --layers 16 the model has 1.04 billion parameters; peak memory and seconds are those of the undisturbed run.
"""

import argparse
import json
import random
import shutil
import signal
import subprocess
import tempfile
from pathlib import Path

from benchmarks.stream_memory import CALIBRATED_VOCABULARY, calibrated_command, measure_calibrated, write_model


def run(command: list[str], kill_after: float | None) -> bool:
    """Run to the end, or kill after so many seconds. Returns whether it came to its end."""
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        _, errors = process.communicate(timeout=kill_after)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGKILL)
        process.communicate()
        return False
    if process.returncode:
        raise SystemExit(errors)
    return True


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", default="gptq")
    parser.add_argument("--kills", type=int, default=3)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    chance = random.Random(arguments.seed)
    folder = Path(tempfile.mkdtemp(prefix="ptqc-resume-"))
    try:
        source, alone, killed = folder / "source", folder / "alone", folder / "killed" / "out"
        write_model(source, 1e9, CALIBRATED_VOCABULARY, arguments.layers)
        row = measure_calibrated(source, alone, arguments.method)
        seconds = row["seconds"]
        print(f"undisturbed: {seconds:.1f} s, peak {row['peak_bytes'] / 1e9:.3f} GB", flush=True)
        killed.parent.mkdir()
        pieces = 0
        starts = []
        for start in range(1, arguments.kills + 2):
            # What is left gets shorter with every finished piece; every layer makes two.
            left = seconds * (1 - pieces / (2 * arguments.layers))
            moment = chance.uniform(0.2, 0.8) * max(left, 10.0) if start <= arguments.kills else None
            is_done = run(calibrated_command(source, killed, arguments.method), moment)
            pieces = len(list(killed.parent.glob(".out.ptqc-work/piece-*.safetensors")))
            state = "came to its end" if is_done else f"killed after {moment:.1f} s, {pieces} pieces finished"
            left_beside = ", ".join(sorted(file.name for file in killed.parent.iterdir()))
            print(f"start {start}: {state}, left beside: {left_beside}", flush=True)
            starts.append({"killed_after_s": None if is_done else moment, "pieces_finished": pieces})
            if is_done:
                break
        is_same = contents(alone) == contents(killed)
        left_over = sorted(file.name for file in killed.parent.iterdir())
        print(f"{len(contents(alone))} files, {'identical' if is_same else 'DIFFERENT'}; left over: {left_over}")
        if arguments.json:
            figures = {"method": arguments.method, "layers": arguments.layers, "undisturbed": row, "starts": starts}
            arguments.json.write_text(json.dumps(figures | {"is_identical": is_same}, indent=1) + "\n")
        if not is_same or left_over != ["out"]:
            raise SystemExit("a killed run does not write what an undisturbed one does")
    finally:
        shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    main()
