"""Rotations: what one is, where it touches a model (`SITES`), which are drawn, how they are fused."""
