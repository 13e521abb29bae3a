"""Parts that several methods share, each next to its formula."""
