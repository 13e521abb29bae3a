"""Components that several methods use, each next to its formula."""
