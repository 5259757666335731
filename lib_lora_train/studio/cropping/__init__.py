"""Images cropped, scaled, flipped and split, always from the image as it was imported, together with their masks.

`crop_plan.py` computes what is cut without writing anything, `subject.py` finds what a cut should keep, and `crop.py` applies
a plan to a dataset, takes it back, and keeps the masks.
"""
