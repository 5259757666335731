"""The dataset studio: images imported, inspected, shaped, captioned and edited, in a dataset folder that it owns.

    session.py           the one open dataset and every quick operation on it, under one lock
    dataset_session.py   that dataset: its files, its captions as edited, its report and its scores
    operations.py        background tasks: importing, captioning, checking, shaping, caption scores, class images
    shaping.py           operations on single images: crop, flip, split, masks, previews
    tasks.py             the one background task, with progress, problems and stop
    requests.py          what the routes are sent, validated
    view.py              what the page shows, as plain data
    uploads.py           files that a page sends, until they are imported
    thumbs.py            images for a browser
    captions/            the caption store; importing/ and cropping/: what works on the dataset's files
    commands/            the same operations from the command line
"""
