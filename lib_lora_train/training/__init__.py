"""Noise, loss, optimiser, precision, the step, and the loop that reads like the method.

Not here: where images and captions come from (`dataset/`, `inputs/`), what is trained (`adapters/`), and who watches:
everything that reports reads the loop's events.
"""
