"""A run's folder: written, read, opened again, exported."""
