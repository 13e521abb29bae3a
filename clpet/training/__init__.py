"""Fitting one task: the trainer, its checkpoints inside a task, and learning-rate schedules."""
