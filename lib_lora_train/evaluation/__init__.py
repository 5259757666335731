"""Looking at what was learnt: a sampler on the borrowed model. Not here yet: held-out loss, diagnosis, grids, reports."""
