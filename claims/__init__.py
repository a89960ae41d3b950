"""The claims of the four papers, each one experiment: `python reproduce.py NAME` starts it."""
