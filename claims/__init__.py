"""The claims of the four papers, each as one experiment: `python reproduce.py NAME` starts it."""
