"""The claims of the papers, each one experiment: `python reproduce.py NAME` starts it."""
