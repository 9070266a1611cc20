"""Which scale groups are found in real architectures, and is every fold right?

    python -m benchmarks.folds [--only causal/gpt2 ...] [--workers 1] [--json FILE]

Each tiny model of `benchmarks/zoo` (every parameter random, so that a wrong fold or a forgotten bias shows) is captured
and its groups found. Every fold is applied on its own with random scales in [0.5, 2] and the model run eagerly in
float64 before and after: the largest relative change of any output must stay under 1e-9. Finished models are kept in
the JSON-lines file beside FILE, so a killed run resumes.
"""

import argparse
import json
import time
from collections import Counter

from benchmarks.sweep import sweep, write

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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    swept = sweep("benchmarks.folds", lambda key, arguments: [check(key)], parser)
    if swept is None:
        return
    rows, arguments = swept
    for row in rows:
        if "failure" in row or row["wrong"]:
            print(f"{row['arch']}: {row.get('failure') or row['wrong']}")
    summary = summary_of(rows)
    print(json.dumps(summary, indent=1))
    if arguments.json:
        write(arguments.json, {"summary": summary, "rows": rows})


if __name__ == "__main__":
    main()
