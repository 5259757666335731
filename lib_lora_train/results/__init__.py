"""What a run made and what it is worth: its saves, the page that shows them, and the one that is taken.

    history.py   the events of a run as they count in the end
    saves.py     the saves of a run, from its events and the disk
    references.py  the images of a run that it was not trained on, and those that it was
    grid.py      its saves at several weights beside each other, sampled by the host
    average.py   the average of its last saves
    overview.py  all that the results page shows of a run
"""
