"""Images from folders, files, uploads and zip files into a dataset folder in kohya's layout.

`sources.py` lists what there is, `archive.py` reads zip files within limits, `names.py` makes file names that every system
accepts, `collect.py` copies the images with their captions and masks, and `owned.py` is the dataset folder itself.
"""
