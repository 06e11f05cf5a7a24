"""One command a figure of the README; each prints a table and saves it with its conditions."""
