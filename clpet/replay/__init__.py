"""Which old examples come back, and how they are mixed with the new ones."""
