"""Rotations: what one is, where it touches a model (`SITES`), how it is drawn and fused."""
