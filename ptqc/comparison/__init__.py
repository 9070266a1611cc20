"""Comparing methods on one model: the runs, their files, picture and page. Nothing of it is needed to quantize."""
