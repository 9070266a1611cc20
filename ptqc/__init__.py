"""ptqc."""
