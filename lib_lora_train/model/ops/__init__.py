"""Frozen layers and the operations they are made of."""
