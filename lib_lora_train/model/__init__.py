"""The frozen network by reference: UNet, VAE, text encoders and noise schedule over tensors that somebody lends.

    tensors (ldm/sgm names) --family.detect--> Architecture --frozen.build--> FrozenModel

    architecture.py  value objects: what was recognised, and hints about what shapes cannot tell
    family.py        names and shapes -> Architecture
    refusals.py      the kinds of checkpoint that are refused, each with its sentence
    hints_file.py    the `.yaml` beside a checkpoint -> Hints
    components.py    the flat dict cut into UNet, VAE and text encoders; OpenCLIP names turned into Hugging Face names
    layers.py        frozen layers over borrowed tensors, and the place where an adapter takes over a layer
    unet.py          the UNet of SD1, SD2 and SDXL
    vae.py           encoder and decoder
    text_encoder.py  the transformer of CLIP and OpenCLIP
    text.py          captions -> chunks of 77 tokens -> context, pooled vector, size vector
    tokens.py        text -> token ids
    schedule.py      alphas_cumprod, noising, targets
    frozen.py        all of it in one object

Nothing here copies a weight to keep, sets `requires_grad`, or calls a module of the host.
Not covered: prompts with emphasis, textual-inversion embeddings, samplers.
"""
