"""The settings of what is trained; see `areas.py`."""

from __future__ import annotations

import dataclasses

from lib_lora_train.settings.field import setting


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """What is trained."""

    network_module: str = setting(
        "LoRA", "Kind", "LoRA suits nearly everything and works everywhere. LoHa and LoKr are other products of small matrices "
        "(LyCORIS); LoKr makes the smallest files. OFT only rotates what the model has; its rank is the number of blocks, "
        "fewer learn more.", choices=("LoRA", "LoHa", "LoKr", "OFT"))
    dora_wd: bool = setting(
        False, "DoRA", "Learn the length of the weights apart from their direction (arXiv 2402.09353): slower, closer to a "
        "full training at low ranks.")
    network_dim: int = setting(
        16, "Rank", "Size of the LoRA. 8 to 32 suits most; larger learns more detail and overfits sooner.",
        minimum=1, maximum=1024, in_view=True)
    network_alpha: float = setting(
        8.0, "Alpha", "The LoRA's strength is alpha / rank. Half the rank is usual, 0 is the rank.", minimum=0, maximum=4096,
        step=0.5, in_view=True)
    network_train_unet_only: bool = setting(
        True, "UNet only", "Leave the text encoder as it is: less memory, faster. Off trains it too, which helps a new "
        "trigger word.", in_view=True)
    train_trigger_embedding: bool = setting(
        False, "Train the trigger word's embedding", "Give the trigger word vectors of its own and train them with the LoRA, "
        "so that the word is learnt although the text encoder stays as it is. They lie in the LoRA's file, and the word means "
        "this wherever the LoRA is in the prompt. Takes a little more memory and time.")
    embedding_vectors: int = setting(
        2, "Vectors of the trigger word", "More hold more detail, and each takes one of the prompt's 75 tokens.", minimum=1,
        maximum=32)
    embedding_init_text: str = setting(
        "", "Initial text", "Words close to what is learnt, such as a toy: the vectors begin with their meaning. Empty takes "
        "the class word if there is one, else what the trigger word means already.")
    embedding_lr: float = setting(
        1e-3, "Embedding learning rate", "How fast the trigger word's vectors learn. 1e-3 is usual; lower it if the pictures "
        "break up early.", minimum=0, maximum=10)
    stop_embedding_training: float = setting(
        1.0, "Embedding trained until", "The share of the run after which the vectors stay as they are and only the LoRA goes "
        "on. 0.5 helps where everything looks like the training pictures.", minimum=0.01, maximum=1, step=0.05)
    network_weights: str = setting(
        "", "Continue from LoRA", "A LoRA file to go on from. Its kind, layers, rank and alpha are taken over.",
        is_path=True)
    network_targets: str = setting(
        "attention and feed-forward", "Layers", "Which of the UNet's layers are trained. attention at rank 4 is the small "
        "file of the first LoRAs; cross-attention is where the words are read; convolutions learn fine texture; the B-LoRA "
        "blocks (SDXL) learn what is shown apart from its style. text encoder trains no layer of the UNet.",
        choices=("attention and feed-forward", "attention", "cross-attention", "attention and convolutions", "text encoder",
                 "B-LoRA content", "B-LoRA style", "B-LoRA content and style"))
    conv_dim: int = setting(
        0, "Rank of convolutions", "With a number the UNet's convolutions are trained too, at this rank (LoCon): more "
        "texture in a larger file. Empty or 0 leaves it to the layers chosen above.", minimum=0, maximum=1024, zero="auto")
    conv_alpha: float = setting(
        0.0, "Alpha of convolutions", "Empty or 0 gives convolutions the strength of the other layers.", minimum=0,
        maximum=4096, step=0.5, zero="auto")
    factor: int = setting(
        -1, "LoKr factor", "How a LoKr cuts each layer: small numbers, as 4, make large files that learn more, -1 the "
        "smallest.", minimum=-1, maximum=1024)
    full_matrix: bool = setting(
        False, "Whole LoKr matrices", "Train the larger of a LoKr's two matrices whole instead of at the rank.")
