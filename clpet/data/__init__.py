"""Benchmarks: tasks, their order, templates, splits, and batches of encoded examples."""
