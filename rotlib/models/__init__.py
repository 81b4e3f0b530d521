"""Models and texts: where they come from, and where a model keeps what a rotation touches."""
