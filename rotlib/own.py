"""Rotations of your own: what README's "Add a rotation" puts here. A change of this file makes no other rotation's results stale."""
