"""The studio from the command line: `check`, `prepare`, `tag`, `check-captions` and `class-pictures`.

`arguments.py` declares the arguments of all of them and imports a command's module only when it runs. `results.py` has the
commands on what a run made.
"""
