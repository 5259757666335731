"""What is trained: which layers, the low-rank weights beside them, and the file they end up in.

    targets.py    the layers that kohya's default adapts, and the key each has in the file
    lora.py       one low-rank layer; its forward reads like the paper
    network.py    all of them together: build, continue, parameters for the optimiser, tensors for the file
    metadata.py   facts about a run -> the strings that a LoRA file carries
    file.py       the file: atomic save, hashes, load, inspect

Not here: LoCon, LoHa, LoKr and DoRA. Each will be one more layer class with the same two methods
(`linear`, `conv2d`) and its own tensors; the rest of this room asks a layer for no more than that.
"""
