"""The studio from the command line: `check`, `prepare`, `tag`, `check-captions` and `class-pictures`.

`arguments.py` declares the arguments of all of them and imports a command's module only when it runs.
"""
