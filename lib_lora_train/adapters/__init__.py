"""What is trained: which layers, the low-rank weights beside them, and the file they end up in.

    targets.py    the layers that kohya's default adapts, and the key each has in the file
    lora.py       one low-rank layer: its two matrices, its scale, how it begins
    network.py    all of them together: build, continue, freeze, parameters for the optimiser, tensors for the file
    flat.py       all weights in one buffer and all gradients in another
    metadata.py   facts about a run -> the strings that a LoRA file carries
    file.py       the file: atomic save, hashes, load, inspect

Not here: LoCon, LoHa, LoKr and DoRA. `network.py` and `file.py` know the tensors of plain LoRA only.
"""
