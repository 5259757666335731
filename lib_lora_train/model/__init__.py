"""The frozen model over borrowed tensors.

    tensors (ldm/sgm names) --family.detect--> Architecture --frozen.build--> FrozenModel

    family.py        one object a family of models, and which one a checkpoint is of
    architecture.py  value objects: what was recognised, and hints about what shapes cannot tell
    frozen.py        UNet, VAE, text encoders and noise schedule in one object
    fingerprint.py   which weights a model holds
    sd/              Stable Diffusion 1, 2 and XL: detection and refusals, UNet, VAE, text encoders, captions, schedule,
                     names in checkpoints and LoRA files, the `.yaml` beside a checkpoint
    ops/             frozen layers and what adapters add to them: linear, convolution (winograd), attention; recipes are
                     norms and activations that backward recomputes; quantised kernels

No weight is copied to keep except in `Layers.replace` and `lay_out_channels_last`, no `requires_grad` of the host's is
set, and no module of the host is called. Not covered: prompts with emphasis, textual-inversion embeddings.
"""
