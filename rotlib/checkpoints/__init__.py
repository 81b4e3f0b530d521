"""Checkpoints that stock software reads: compressed-tensors, GGUF, or a plain folder."""
