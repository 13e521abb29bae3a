"""Replay: which old examples are trained on again, and how they are mixed with the new ones."""
