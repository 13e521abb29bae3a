"""What a model is asked to do with a benchmark's text."""
