"""Kernels and export formats (the folder `codegen/` at the top of the repository)."""

if __name__ != "ptqc.codegen":
    raise ImportError("import this package as ptqc.codegen")
