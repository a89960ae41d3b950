"""The claims of the papers, each as one experiment: `python reproduce.py NAME` starts it."""
