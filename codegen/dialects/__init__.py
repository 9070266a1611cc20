"""Checkpoint dialects, one per file: how other programs store quantized weights in safetensors folders."""
