"""Data: benchmarks, their tasks and order, templates, splits, and batches of encoded examples."""
