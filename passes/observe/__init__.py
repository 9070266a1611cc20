"""Observing passes: what the inputs of weights look like on calibration data."""
