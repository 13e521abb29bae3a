"""Continual-learning methods, one file each; `base.py` has the hooks they override."""
