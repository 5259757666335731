"""Noise, loss, optimiser, precision, the step, and the loop that reads like the method.

Not here: where images and captions come from (`dataset/`, `cache/`), what is trained (`network/`), and who watches:
everything that reports reads the loop's events.
"""
