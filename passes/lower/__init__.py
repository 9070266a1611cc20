"""Lowering passes: from a float or quantized graph to `ptqc::` operators."""
