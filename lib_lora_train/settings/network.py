"""The settings of what is trained; see `areas.py`."""

from __future__ import annotations

import dataclasses

from lib_lora_train.settings.field import setting

LORA_PLUS = ("loraplus_lr_ratio", "loraplus_unet_lr_ratio", "loraplus_text_encoder_lr_ratio")
BLOCK_SIZES = ("block_dims", "block_alphas", "conv_block_dims", "conv_block_alphas")
BLOCK_RATES = ("down_lr_weight", "mid_lr_weight", "up_lr_weight")


@dataclasses.dataclass(frozen=True)
class NetworkSettings:
    """What is trained."""

    network_module: str = setting(
        "LoRA", "Kind", "LoRA suits nearly everything and works everywhere. LoHa and LoKr are other products of small matrices "
        "(LyCORIS); LoKr makes the smallest files. OFT only rotates what the model has; its rank is the number of blocks, "
        "and fewer learn more in much larger files: take the layers attention.", choices=("LoRA", "LoHa", "LoKr", "OFT"))
    dora_wd: bool = setting(
        False, "DoRA", "Learn the length of the weights apart from their direction (arXiv 2402.09353): slower, closer to a "
        "full training at low ranks.")
    network_dim: int = setting(
        16, "Rank", "Size of the LoRA. 8 to 32 suits most; larger learns more detail and overfits sooner.",
        minimum=1, maximum=1024, in_view=True)
    network_alpha: float = setting(
        8.0, "Alpha", "The LoRA's strength is alpha / rank: more learns faster, as a higher learning rate would. Half the "
        "rank is usual, 0 is the rank.", minimum=0, maximum=4096, step=0.5, in_view=True)
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
        1e-3, "Embedding learning rate", "How fast the trigger word's vectors learn. 1e-3 is usual; raise it if the word "
        "does nothing, lower it if the pictures break up early.", minimum=0, maximum=10)
    stop_embedding_training: float = setting(
        1.0, "Embedding trained until", "The share of the run after which the vectors stay as they are and only the LoRA "
        "goes on. Less leaves more to the LoRA: 0.5 helps where everything looks like the training pictures.", minimum=0.01,
        maximum=1, step=0.05)
    network_weights: str = setting(
        "", "Continue from LoRA", "A LoRA file to go on from. Its kind, layers, rank and alpha are taken over.",
        is_path=True)
    train_on_top_of: str = setting(
        "", "Train on top of", "LoRAs that are in the model while this one is trained, so that it learns what they lack: "
        "<lora:name:0.8>, or path.safetensors:0.8, with commas between several. Use them together afterwards.")
    network_targets: str = setting(
        "attention and feed-forward", "Layers", "Which of the UNet's layers are trained. attention at rank 4 is the small "
        "file of the first LoRAs; cross-attention is where the words are read; convolutions learn fine texture; the B-LoRA "
        "blocks (SDXL) learn what is shown apart from its style. text encoder trains no layer of the UNet.",
        choices=("attention and feed-forward", "attention", "cross-attention", "attention and convolutions", "text encoder",
                 "B-LoRA content", "B-LoRA style", "B-LoRA content and style"))
    conv_dim: int = setting(
        0, "Rank of convolutions", "With a number the UNet's convolutions are trained too, at this rank (LoCon): the larger, "
        "the more texture in a larger file. Empty or 0 leaves it to the layers chosen above.", minimum=0, maximum=1024,
        zero="auto")
    conv_alpha: float = setting(
        0.0, "Alpha of convolutions", "Strength of the convolutions, as alpha is of the other layers: more learns faster. "
        "Empty or 0 gives them the strength of the others.", minimum=0, maximum=4096, step=0.5, zero="auto")
    factor: int = setting(
        -1, "LoKr factor", "How a LoKr cuts each layer: small numbers, as 4, make large files that learn more, -1 the "
        "smallest.", minimum=-1, maximum=1024)
    full_matrix: bool = setting(
        False, "Whole LoKr matrices", "Train the larger of a LoKr's two matrices whole instead of at the rank.")
    rs_lora: bool = setting(
        False, "rsLoRA", "Strength alpha / √rank instead of alpha / rank (arXiv 2312.03732), so that large ranks learn as fast "
        "as small ones. It is written into the file's alpha.")
    loraplus_lr_ratio: float = setting(
        0.0, "LoRA+ ratio", "Learning rate of the second matrix of each pair, times that of the first (arXiv 2402.12354). "
        "More learns faster and breaks sooner: 16 is usual, with a lower learning rate; empty or 0 is 1.", minimum=0,
        maximum=1000, zero="none")
    loraplus_unet_lr_ratio: float = setting(
        0.0, "LoRA+ ratio of the UNet", "In place of the one above.", minimum=0, maximum=1000, zero="none")
    loraplus_text_encoder_lr_ratio: float = setting(
        0.0, "LoRA+ ratio of the text encoder", "In place of the one above.", minimum=0, maximum=1000, zero="none")
    network_dropout: float = setting(
        0.0, "Dropout", "Share of the numbers between the two matrices that is left out at random in each step, against "
        "learning by heart. More learns more slowly; 0.1 to 0.3 where wanted.", minimum=0, maximum=0.99, step=0.01)
    rank_dropout: float = setting(
        0.0, "Rank dropout", "Share of the ranks that is left out at random in each step, anew for each picture. More learns "
        "more slowly and less by heart.", minimum=0, maximum=0.99, step=0.01)
    module_dropout: float = setting(
        0.0, "Module dropout", "Share of the layers that are left as they are in each step. More learns more slowly and less "
        "by heart.", minimum=0, maximum=0.99, step=0.01)
    scale_weight_norms: float = setting(
        0.0, "Largest weight norm", "Scale the change of a layer down where its norm is larger: less overfitting, and LoRAs "
        "that go together better. Smaller makes a weaker LoRA; 1 is usual, 0 is off.", minimum=0, maximum=1000, step=0.1)
    block_dims: str = setting(
        "", "Rank of each block", "25 numbers for SD1 and SD2, 23 for SDXL, with commas: the rank in each block of the UNet, 0 "
        "for a block that is left as it is. Empty is the same everywhere.")
    block_alphas: str = setting("", "Alpha of each block", "As many numbers as ranks. Empty is the alpha everywhere.")
    conv_block_dims: str = setting(
        "", "Convolutions' rank of each block", "As many numbers. Empty is the rank of convolutions everywhere.")
    conv_block_alphas: str = setting("", "Convolutions' alpha of each block", "As many numbers as ranks.")
    down_lr_weight: str = setting(
        "", "Rates of the downward blocks", "What the learning rate is multiplied by in each of 12 (SDXL 9) blocks, or cosine, "
        "sine, linear, reverse_linear or zeros, with +0.25 for what is added. 0 leaves a block as it is.")
    mid_lr_weight: str = setting("", "Rates of the middle blocks", "1 number, for SDXL 3.")
    up_lr_weight: str = setting("", "Rates of the upward blocks", "As of the downward blocks.")
    block_lr_zero_threshold: float = setting(
        0.0, "Smallest rate of a block", "Blocks whose number is not larger are left as they are; a larger one leaves out "
        "more of them.", minimum=0, maximum=100, step=0.05)
