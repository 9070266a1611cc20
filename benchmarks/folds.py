"""Which scale groups are found in real architectures, and is every fold right?

    python -m benchmarks.folds [--only causal/gpt2 ...] [--workers 1] [--json FILE]

Each tiny model of `benchmarks/zoo` (every parameter random, so that a wrong fold or a forgotten bias shows) is captured
and its groups found. Every fold is applied on its own with random scales in [0.5, 2] and the model run eagerly in
float64 before and after: the largest relative change of any output must stay under 1e-9. Finished models are kept in
the JSON-lines file beside FILE, so a killed run resumes.
"""

import argparse
import json
import platform
import time
from collections import Counter
from pathlib import Path

from benchmarks import apart

TOLERANCE = 1e-9


def check(key):
    """One row for one architecture."""
    import torch

    from benchmarks.zoo import zoo
    from ptqc.capture import capture
    from ptqc.passes.groups.check import verify
    from ptqc.passes.groups.find import find_groups
    from ptqc.program import program

    torch.set_num_threads(1)
    row = {"arch": key}
    try:
        model, batch = zoo.build(zoo.Arch.parse(key), seed=0)
        programs = [program(graph, model, batch) for graph in capture(model, batch)]
        start = time.time()
        groups = find_groups(programs)
        seconds = time.time() - start
        folds = [group for group in groups if group.kind == "fold"]
        chance = torch.Generator().manual_seed(0)
        scales = [torch.rand(group.channels, generator=chance, dtype=torch.float64) * 1.5 + 0.5 for group in folds]
        errors = verify(model, batch, folds, scales)
    except Exception as failure:
        return row | {"failure": f"{type(failure).__name__}: {failure}"[:600]}
    wrong = [
        {"producer": [entry.name for entry in group.producer], "consumers": list(group.names), "error": error}
        for group, error in zip(folds, errors, strict=True)
        if not error <= TOLERANCE
    ]
    return row | {
        "graphs": len(programs),
        "nodes": sum(len(one.graph.nodes) for one in programs),
        "seconds": round(seconds, 2),
        "kinds": dict(Counter(group.kind for group in groups)),
        "structures": dict(Counter(f"{group.kind}: {group.structure}" for group in groups)),
        "reasons": dict(Counter(f"{group.kind}: {group.reason}" for group in groups if group.reason)),
        "largest_error": max(errors, default=0.0),
        "wrong": wrong,
    }


def summary_of(rows):
    """Totals over all architectures."""
    ran = [row for row in rows if "failure" not in row]
    kinds = sum((Counter(row["kinds"]) for row in ran), Counter())
    return {
        "architectures": len(rows),
        "failed": len(rows) - len(ran),
        "with_a_fold": sum(row["kinds"].get("fold", 0) > 0 for row in ran),
        **{f"groups_{kind}": count for kind, count in sorted(kinds.items())},
        "norm_folds": sum(
            count for row in ran for name, count in row["structures"].items() if name.startswith("fold: norm")
        ),
        "wrong": sum(len(row["wrong"]) for row in ran),
        "largest_error": max((row["largest_error"] for row in ran), default=0.0),
        "largest_seconds": max((row["seconds"] for row in ran), default=0.0),
        "reasons": dict(sum((Counter(row["reasons"]) for row in ran), Counter()).most_common()),
    }


def show(row):
    """One line for one architecture."""
    if "failure" in row:
        return f"{row['arch']}: {row['failure']}"
    return f"{row['arch']}: {row['kinds']} largest error {row['largest_error']:.1e} {row['wrong'] or ''}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*")
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one architecture")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", nargs="*", help="run these here and print rows (used by the benchmark itself)")
    arguments = parser.parse_args()
    if arguments.worker:
        for key in arguments.worker:
            print("ROW " + json.dumps(check(key)), flush=True)
        return
    keys = arguments.only or apart.all_keys()
    journal = arguments.json.with_suffix(".jsonl") if arguments.json else None
    rows = apart.run(["benchmarks.folds"], keys, arguments.timeout, arguments.workers, journal, show)
    summary = summary_of(rows)
    print(json.dumps(summary, indent=1))
    if arguments.json:
        import torch
        import transformers

        versions = {
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": platform.python_version(),
        }
        result = {"summary": summary, "rows": rows, "versions": versions, "date": time.strftime("%Y-%m-%d")}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
