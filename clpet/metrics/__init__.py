"""Transfer matrices and text scores: numbers in, numbers out."""
