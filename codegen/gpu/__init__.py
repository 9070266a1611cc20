"""Kernels for GPUs, written as text for Triton: how weights lie in memory, how codes become numbers, loop nests.

words    where the bits of a code lie           decode     from a word to the levels of its codes
chains   prologues and epilogues                weight_only, loop, eight_bit    the kernels' texts
scaled   .. to weights, where groups have scales    forms, parts    what a spec becomes, and stored parts
tiles    which tile for how many rows           launch     what a loaded text runs
"""
