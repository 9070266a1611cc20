"""Graph passes, transforms and quantization methods (the folder `passes/` at the top of the repository)."""

if __name__ != "ptqc.passes":
    raise ImportError("import this package as ptqc.passes")
