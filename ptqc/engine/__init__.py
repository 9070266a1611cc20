"""The engine: statistics in, transforms and methods applied, a piece of the model or all of it at a time."""
