"""Output for people: progress, tables, comparisons, figures."""
