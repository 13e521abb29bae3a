"""Scoring a method on every task, and inspecting a benchmark's data."""
