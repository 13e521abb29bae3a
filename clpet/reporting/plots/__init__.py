"""Figures drawn with matplotlib, one module per subject; run_figures.py draws those of a whole run."""
