"""What happens below the ideas: files, pictures, processes, the screen. Nothing here knows
what diffusion is."""
import os

# A thread that waits for another one first spins, then sleeps. GNU's OpenMP spins for
# milliseconds: beside one other busy program, both threads of two cores then mostly wait
# for each other, and a step of training takes 11 seconds instead of 0.45. With a short spin
# a quiet machine is as fast as before. torch reads this once, when it is imported.
os.environ.setdefault("GOMP_SPINCOUNT", "2000")
