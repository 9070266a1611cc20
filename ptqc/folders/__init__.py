"""Model folders on disk: strict reading, whole-or-nothing writing, the checkpoint, streaming, transformers."""
