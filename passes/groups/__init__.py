"""Scale groups: what may be rescaled in a model without changing its function, proved on its graph."""
