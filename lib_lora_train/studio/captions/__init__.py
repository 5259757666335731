"""The caption store: all captions of a dataset in memory, with filters, edits, undo and redo, and one save.

`store.py` is the store; `files.py` reads caption files, `filter.py` selects captions, `edits.py` changes them, and `save.py`
writes every changed caption or none, also when the process is killed in between.
"""
