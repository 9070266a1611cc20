"""C++ kernels for CPUs, compiled at run time by the system's compiler: the parts that `targets.cpp` puts together.

    levels       what integer or float a stored code stands for
    blocks       how the inputs are cut into blocks that share an activation scale
    layout       from the stored parts to the bytes that a kernel reads
    isa          the vector instructions of each CPU, behind five small functions
    prologue, tiles, epilogue, source      the C++ text
    toolchain    from a text to a loaded library
    launch       one call
"""
