"""The report: one HTML file about a folder of runs, which needs neither a network nor a server."""
