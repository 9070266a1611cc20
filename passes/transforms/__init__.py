"""Transforms: one file each, registered under the name of the file (see `ptqc.transforms`)."""
