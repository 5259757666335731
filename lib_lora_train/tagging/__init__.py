"""Captions found for images: taggers behind one interface, and the rules by which what they say becomes a caption.

    captioner.py    what a captioner and its source offer
    options.py      what the user chooses
    rules.py        from what was found to the caption's text
    wd.py           SmilingWolf's WD v3 taggers from a folder
    plain.py        captions that need no model: the prompt inside the image, its name, a template
    sources.py      everything a host can caption with
    loop.py         the loop over the images

Captions are only composed here; reading and writing them is the dataset's.
"""
