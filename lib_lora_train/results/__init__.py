"""What a run made and what it is worth: its saves, the page that shows them, and the one that becomes the LoRA.

    history.py         the events of a run as they count in the end
    improvement.py     how much better than the base model its losses are, over all and for each training image
    saves.py           the saves of a run, from its events and the disk
    references.py      the images of a run that it was not trained on, and those that it was
    grid.py            its saves at several weights beside each other, sampled by the host
    average.py         the average of its last saves
    scoring.py         the scores of the grid's images, and the spread of each column
    recommend.py       which save to take, at which weight, and why
    promote.py         a save becomes the LoRA; saves are deleted, and shown among the WebUI's LoRAs
    user_metadata.py   the WebUI's card and preview of a LoRA, beside what the user wrote there
    overview.py        all that the results page shows of a run
"""
