"""The claims of the four papers, each one experiment, started by `python reproduce.py NAME`."""
