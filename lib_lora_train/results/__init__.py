"""What a run made and what it is worth: its saves, the page that shows them, and the one that is taken.

    history.py   the events of a run as they count in the end
    saves.py     the saves of a run, from its events and the disk
    overview.py  all that the results page shows of a run
"""
