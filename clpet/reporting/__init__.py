"""What a person reads: progress, tables, comparisons, plots."""
