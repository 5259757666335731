"""The dataset studio: pictures brought in, looked at, shaped, captioned and edited, on a folder it owns.

    session.py    the one open dataset and everything quick that can be done to it, under one lock
    opened.py     that dataset: files, captions as edited, what was found out about them
    work.py       long work: importing, looking at pictures, shaping, captioning
    work_model.py long work with the host's model: are captions right, preservation pictures
    shaping.py    one picture cut, mirrored, split; previews
    tasks.py      one piece of it at a time, on a thread of its own, with progress and stop
    uploads.py    files a page sends, on their way in
    thumbs.py     pictures for a browser, small ones kept
    view.py       what a page shows, as plain data
    asked.py      what a page asks, checked
    *_command.py  the same from the command line
"""
