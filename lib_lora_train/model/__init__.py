"""The frozen network by reference: UNet, VAE, text encoders and noise schedule over tensors that somebody lends.

    tensors (ldm/sgm names) --family.detect--> Architecture --frozen.build--> FrozenModel

    architecture.py  value objects: what was recognised, and hints about what shapes cannot tell
    family.py        names and shapes -> Architecture
    refusals.py      the kinds of checkpoint that are refused, each with its sentence
    hints_file.py    the `.yaml` beside a checkpoint -> Hints
    components.py    the flat dict cut into UNet, VAE and text encoders; OpenCLIP names turned into Hugging Face names
    fingerprint.py   whether the frozen weights are still the same ones
    weights.py       what a frozen layer multiplies with: a borrowed tensor, or one that is made for a moment
    quantised.py     kernels in eight bits, for those who ask for copies
    layers.py        frozen layers over borrowed tensors by name, with the adapters that change them
    products.py      linear layers and the low-rank products added into them, as one autograd function
    recipes.py       norms, activations and gates between two products, made again in backward
    convolution.py   frozen convolutions; winograd.py computes some of them with fewer multiplications
    attention.py     softmax(q kᵀ / √d) v
    unet.py          the UNet of SD1, SD2 and SDXL
    vae.py           encoder and decoder
    text_encoder.py  the transformer of CLIP and OpenCLIP
    text.py          captions -> chunks of 77 tokens -> context, pooled vector, size vector
    tokens.py        text -> token ids
    schedule.py      alphas_cumprod, noising, targets
    frozen.py        all of it in one object

No weight is copied to keep unless that is asked for (`Layers.replace`, `lay_out_channels_last`), none of the lender's
`requires_grad` is set, no module of the host is called.
Not covered: prompts with emphasis, textual-inversion embeddings, samplers.
"""
