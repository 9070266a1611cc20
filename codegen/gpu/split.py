"""Text for programs that share a tile: each leaves what it found in a workspace, the last to arrive joins it.

What is joined is read in the order of the runs, so the result does not depend on who was last. A counter tells the
last, which sets it back to zero for the next launch.
"""

__all__ = ["joined_by_last", "summed_by_last"]

_SPLIT = """if IS_SPLIT:
        {stores}
        tl.debug_barrier()
        arrived = tl.atomic_add(lock_ptr + tl.program_id(0), 1, sem="acq_rel")
        if arrived == SPLIT - 1:
            {joins}
            tl.store(lock_ptr + tl.program_id(0), 0)
            {tail}
    else:
        {tail}"""

_STORES = """slot = part_ptr + tl.program_id(0) * (SPLIT * BM * BN)
        slot += tl.arange(0, BM)[None, :] * BN + tl.arange(0, BN)[:, None]
        tl.store(slot + tl.program_id(1) * (BM * BN), acc)"""
_SUMS = """acc = tl.zeros((BN, BM), tl.float32)
            for run in range(0, SPLIT):
                acc += tl.load(slot + run * (BM * BN), cache_modifier=".cg")"""


def joined_by_last(stores: str, joins: str, tail: str) -> str:
    """Lines of a kernel, indented by four: `tail` goes on with what a program has found alone, or with what is joined.

    stores: indented by eight, joins: by twelve. Runs are program_id(1), tiles program_id(0).
    """
    return _SPLIT.format(stores=stores, joins=joins, tail=tail)


def summed_by_last(tail: str) -> str:
    """The same for sums acc [BN, BM]."""
    return joined_by_last(_STORES, _SUMS, tail)
