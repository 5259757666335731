"""The dataset studio: pictures brought in, looked at, shaped, captioned and edited, on a folder it owns.

    tasks.py      one piece of long work at a time, on a thread of its own, with progress and stop
    session.py    the open dataset and everything that can be done to it
    view.py       what the page shows of it, as plain data
    thumbs.py     small pictures, made when they are asked for
    *_command.py  the same from the command line
"""
