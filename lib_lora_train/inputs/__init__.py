"""Latents and text embeddings, computed once; seeded batches made of them."""
