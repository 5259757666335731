"""What is trained, and the file it is saved to.

    base.py       what any adapter offers
    lora.py       LoRA; beside it loha.py, lokr.py, oft.py, and dora.py around another kind
    embedding.py  vectors of its own for a word
    dropout.py    what is left out at random in training
    targets.py    the layers that are adapted, and their keys in the file
    network.py    all adapters of a run, and the registry of kinds
    stack.py      several LoRA files at once, each at a weight of its own
    flat.py       all weights in one buffer and all gradients in another
    metadata.py   a run's description -> the strings that a LoRA file carries
    file.py       the file: atomic save, hashes, load, inspect
"""
