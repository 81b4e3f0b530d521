"""Measures, tensors in and numbers out: fidelity, incoherence, bounds, outliers, zero-shot."""
