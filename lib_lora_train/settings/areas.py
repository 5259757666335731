"""Every setting, once: name, default, range, label and help, grouped by what it is about.

The page, the command line, the API and the documentation are built from these classes and those in `network.py` and `loss.py`.
Names are kohya's where kohya has the setting, so that a user's notes and other people's guides keep working.
"""

from __future__ import annotations

import dataclasses

from lib_lora_train.settings.field import setting


@dataclasses.dataclass(frozen=True)
class DatasetSettings:
    """The images and their captions."""

    train_data_dir: str = setting(
        "", "Dataset folder", "A folder of pictures, or one in kohya's layout (folders named like 10_name). Captions are "
        "text files of the same name beside the pictures.", in_view=True, is_path=True)
    trigger_word: str = setting(
        "", "Trigger word", "A word of your own that will call what is learnt. It is put first in every caption.",
        in_view=True)
    num_repeats: int = setting(
        0, "Repeats", "How often each picture is shown in an epoch: more makes the run longer and these pictures better "
        "learnt. Empty or 0 chooses: at least 100 times a picture and 1500 times in all over the run. Folders named N_name "
        "say it themselves.", minimum=0, maximum=10000, in_view=True, zero="auto")
    resolution: str = setting(
        "auto", "Resolution", "Training size in pixels: one number, or width,height. Larger shows more detail and takes more "
        "memory and time. auto is 512 for SD1, 768 for SD2, 1024 for SDXL. Several with ; between them (512;768) train each "
        "picture at each of them.", in_view=True)
    enable_bucket: bool = setting(
        True, "Aspect buckets", "Keep the shape of each picture: pictures of similar shape are trained together. Off "
        "crops all of them to one size.")
    min_bucket_reso: int = setting(
        256, "Smallest bucket side", "No bucket has a side shorter than this, in pixels. Smaller leaves narrow pictures "
        "their shape, larger crops them more.", minimum=64, maximum=4096, step=64)
    max_bucket_reso: int = setting(
        1024, "Largest bucket side", "No bucket has a side longer than this, in pixels. Larger leaves long pictures their "
        "shape, smaller crops them more. For SDXL at least 2048 is used.", minimum=64, maximum=8192, step=64)
    bucket_reso_steps: int = setting(
        64, "Bucket step", "Bucket sides are multiples of this many pixels. Smaller crops less and makes more buckets, "
        "larger crops more and makes fewer.", minimum=8, maximum=512, step=8)
    bucket_no_upscale: bool = setting(
        False, "No upscaling", "Never enlarge a small picture to fill its bucket.")
    dataset_config: str = setting(
        "", "Folder settings", "Settings of single folders, as sd-scripts reads them: the path of such a file in TOML, or its "
        "text, with [general], [[datasets]] and [[datasets.subsets]]. Its folders are then trained.", several_lines=True)
    reg_data_dir: str = setting(
        "", "Regularisation folder", "Pictures of the general class (kohya's layout), so that the class itself is not "
        "changed. Empty for none.", is_path=True)
    prior_loss_weight: float = setting(
        1.0, "Regularisation weight", "How much the regularisation pictures count: more keeps the class as it was, less "
        "leaves more room for what is learnt.", minimum=0, maximum=100, step=0.1)
    flip_aug: bool = setting(
        False, "Flip", "Show every picture mirrored half of the time. Not for faces or text.", in_view=True)
    color_aug: bool = setting(
        False, "Colour changes", "Vary hue and brightness a little. Pictures are then encoded anew at each step.")
    random_crop: bool = setting(
        False, "Random crop", "Crop at a random place instead of the centre. Pictures are then encoded anew at each step.")
    rotate_aug_degrees: float = setting(
        0.0, "Rotation", "Turn pictures by up to so many degrees either way, cut so that no empty corners show. More varies "
        "more and cuts more off. For small sets, 5 to 10; not where upright lines matter. 0 is off.", minimum=0, maximum=45,
        step=1)
    rotate_aug_variants: int = setting(
        4, "Turned versions", "How many turns of each picture are encoded before the training. More vary more, and take "
        "longer to encode.", minimum=2, maximum=64)
    cache_latents_to_disk: bool = setting(
        False, "Keep encoded pictures on disk", "The next run with the same pictures, size and VAE starts at once.")


@dataclasses.dataclass(frozen=True)
class CaptionSettings:
    """What is done to captions at each step."""

    caption_extension: str = setting(
        "", "Caption files", "Empty reads .txt, or .caption where there is none. Name one ending to read only those files; "
        "with several (.txt, .caption) one of a picture's captions is drawn at each step.")
    shuffle_caption: bool = setting(
        False, "Shuffle tags", "Put the comma-separated tags into a new order at each step.")
    keep_tokens: int = setting(
        1, "Keep first tags", "How many tags stay in front when the others are shuffled or dropped. More keeps more of them "
        "in place.", minimum=0, maximum=255)
    keep_tokens_separator: str = setting(
        "", "Separator of kept tags", "Usually |||. In a caption that holds it, what stands before it stays in front, and "
        "what stands behind a second one stays at the end. Empty for none.")
    caption_separator: str = setting(
        ",", "Tag separator", "What stands between two tags. Change it only for captions that are not written with commas.")
    secondary_separator: str = setting(
        "", "Separator within a tag", "Usually ;;;. Tags with it between them are shuffled and dropped as one, and trained "
        "with commas. Empty for none.")
    enable_wildcard: bool = setting(
        False, "Wildcards", "At each step draw one line of a caption file of several, and one of the words in {red|blue}.")
    caption_prefix: str = setting(
        "", "Prefix", "Put in front of every caption, with a space. Write the comma too where it is a tag.")
    caption_suffix: str = setting(
        "", "Suffix", "Put behind every caption, with a space.")
    caption_dropout_rate: float = setting(
        0.0, "Caption dropout", "Share of the steps that see an empty caption. More makes the LoRA act without its words "
        "too, which suits styles: 0.05 to 0.1 where wanted.", minimum=0, maximum=1, step=0.01)
    caption_dropout_every_n_epochs: int = setting(
        0, "Epochs without captions", "Every n-th epoch sees empty captions only; a smaller n does so more often. Empty or 0 "
        "for none.", minimum=0, maximum=100000, zero="none")
    caption_tag_dropout_rate: float = setting(
        0.0, "Tag dropout", "Share of the tags that are left out at each step: with more, short prompts work better and "
        "single tags do less. The trigger word never is left out.", minimum=0, maximum=1, step=0.01)
    token_warmup_step: int = setting(
        0, "Tag warm-up steps", "Captions begin with few tags and have all of them after so many steps; below 1, a share of "
        "the run's steps. More steps give more to the first tags. 0 is off.", minimum=0, maximum=1_000_000, or_share=True)
    token_warmup_min: int = setting(
        1, "First tags of the warm-up", "With how many tags, besides those that are kept, the tag warm-up begins. More "
        "begins nearer to the whole caption.", minimum=0, maximum=255)
    clip_skip: int = setting(
        0, "Clip skip", "Which text-encoder layer SD1 captions are read from, counted from the end: 1 is the last, and 2 "
        "suits models that are used with 2, as most for anime. Empty or 0 takes what the WebUI is set to.", minimum=0,
        maximum=12, zero="auto")


@dataclasses.dataclass(frozen=True)
class OptimizerSettings:
    """How it is trained: steps, batches, learning rates."""

    max_train_epochs: int = setting(
        10, "Epochs", "How often the whole dataset (with its repeats) is gone through. More learns more, and too many learn "
        "the pictures by heart.", minimum=1, maximum=100000, in_view=True)
    max_train_steps: int = setting(
        0, "Steps", "End after exactly this many steps instead of after the epochs. More learns more, and too many learn the "
        "pictures by heart. Empty or 0 leaves it to the epochs.", minimum=0, maximum=10_000_000, in_view=True, zero="auto")
    max_train_minutes: float = setting(
        0.0, "Time limit", "End after so many minutes and keep what was learnt, if the steps are not done before. Empty or 0 "
        "for none.", minimum=0, maximum=100_000, zero="none")
    train_batch_size: int = setting(
        1, "Batch size", "Pictures in one pass. More makes steps calmer and longer and needs more memory; the learning rate "
        "may be higher then.", minimum=1, maximum=1024, in_view=True)
    gradient_accumulation_steps: int = setting(
        1, "Gradient accumulation", "Passes gathered into one step: the effect of a larger batch without its memory. More "
        "makes steps calmer and longer, and fewer of them.", minimum=1, maximum=1024)
    learning_rate: float = setting(
        1e-4, "Learning rate", "How fast the LoRA learns. 1e-4 is usual; higher learns sooner and ruins pictures where it is "
        "too high, lower needs more steps.", minimum=0, maximum=10, in_view=True)
    unet_lr: float = setting(
        0.0, "UNet learning rate", "Of the UNet alone: higher learns the look of pictures faster. Empty or 0 takes the "
        "learning rate above.", minimum=0, maximum=10, zero="auto")
    text_encoder_lr: float = setting(
        5e-5, "Text encoder learning rate", "Used when the text encoder is trained. Higher ties words to the pictures faster "
        "and spoils other words sooner; half of the UNet's is usual.", minimum=0, maximum=10)
    optimizer_type: str = setting(
        "AdamW", "Optimizer", "The method that turns gradients into changes. AdamW suits most; Prodigy, DAdapt and "
        "ProdigyPlus find the learning rate themselves (set it to 1), schedule-free ones need no schedule. Some need a "
        "package, which is named. module.Class is any other.",
        choices=("AdamW", "AdamW8bit", "PagedAdamW8bit", "Lion", "Lion8bit", "SGDNesterov", "Adafactor", "CAME", "DAdaptAdam",
                 "DAdaptLion", "Prodigy", "AdamWScheduleFree", "RAdamScheduleFree", "ProdigyPlusScheduleFree",
                 "RiemannianAdamW"), open_choice=True)
    optimizer_args: str = setting(
        "", "Optimizer arguments", "What the optimizer is told besides, as its own description has it: betas=0.9,0.99 "
        "d_coef=2. Usually empty.", list_of_texts=True)
    weight_decay: float = setting(
        0.01, "Weight decay", "Pulls weights gently towards zero: more keeps the LoRA weaker, less lets it learn more by "
        "heart.", minimum=0, maximum=1, step=0.01)
    lr_scheduler: str = setting(
        "cosine", "Schedule", "How the learning rate changes over the run; the curve beside it shows it.",
        choices=("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_with_min_lr",
                 "polynomial", "warmup_stable_decay", "rex", "inverse_sqrt", "adafactor"))
    lr_warmup_steps: int = setting(
        0, "Warm-up steps", "Steps over which the learning rate rises from zero; below 1, a share of the run's steps. More "
        "begins more gently.", minimum=0, maximum=1_000_000, or_share=True)
    lr_scheduler_num_cycles: int = setting(
        1, "Restarts", "Cycles of the schedule cosine_with_restarts, or half waves of cosine_with_min_lr and "
        "warmup_stable_decay. More makes the learning rate rise and fall more often.", minimum=1, maximum=1000)
    lr_scheduler_power: float = setting(
        1.0, "Power", "Of the schedule polynomial: 1 is a line, more falls sooner.", minimum=0.01, maximum=100, step=0.5)
    lr_scheduler_min_lr_ratio: float = setting(
        0.0, "Floor", "The share of the learning rate that is left at the end of cosine_with_min_lr, warmup_stable_decay and "
        "polynomial. More goes on learning until the end, less ends more calmly.", minimum=0, maximum=1, step=0.05)
    lr_decay_steps: int = setting(
        0, "Decay steps", "How long the schedule warmup_stable_decay falls at the end; below 1, a share of the run's steps. "
        "More falls more slowly. Empty or 0 is a tenth.", minimum=0, maximum=1_000_000, or_share=True, zero="auto")
    lr_scheduler_timescale: int = setting(
        0, "Time scale", "Steps in which the schedule inverse_sqrt slows down; more keeps the learning rate high for longer. "
        "Empty or 0 is the warm-up, or 10,000.", minimum=0, maximum=10_000_000, zero="auto")
    max_grad_norm: float = setting(
        1.0, "Gradient clipping", "Longest gradient that is allowed: smaller holds wild steps back more, larger lets more of "
        "them through. 0 switches clipping off.", minimum=0, maximum=1000, step=0.1)
    ema_decay: float = setting(
        0.0, "Moving average", "Save and sample the average of the weights over the last steps, which is calmer: 0.99 is about "
        "the last hundred, 0.999 the last thousand. 0 switches it off.", minimum=0, maximum=0.99999, step=0.001)
    seed: int = setting(
        42, "Seed", "The same seed gives the same LoRA on the same machine. -1 draws one.", minimum=-1, maximum=2**32 - 1)


@dataclasses.dataclass(frozen=True)
class MemorySettings:
    """Precision, speed, memory, and the model shared with others."""

    mixed_precision: str = setting(
        "auto", "Precision", "What the model computes in; no is fp32. The LoRA itself is always trained in fp32. On CUDA auto "
        "is fp16 for a model that is held in fp16; others take bf16 from RTX 30 on, fp32 ones fp32 before; elsewhere it is no.",
        choices=("auto", "no", "fp16", "bf16"))
    memory_plan: str = setting(
        "auto", "Memory plan", "auto tries, in this order, what is chosen below, gradient checkpointing, smaller passes, "
        "blocks to swap, activations off the GPU and int8 base weights, and takes the first that fits into the free GPU "
        "memory; manual takes only what is chosen below.", choices=("auto", "manual"))
    memory_budget: float = setting(
        0.0, "Memory budget", "Gigabytes that a training may take, encoding pictures included: less saves memory at the cost "
        "of time. Empty or 0 is what the GPU has free when it begins; without a GPU a plan is made only where a number "
        "stands here.", minimum=0, maximum=1024, step=0.5, zero="auto")
    gradient_checkpointing: bool = setting(
        False, "Gradient checkpointing", "Compute every block again in backward instead of keeping what is inside: much less "
        "memory for about a third more time. The memory plan does so by itself, for as many blocks as it must.")
    cpu_offload_checkpointing: bool = setting(
        False, "Keep activations off the GPU", "From forward to backward the activations lie in the computer's memory instead "
        "of the GPU's, with gradient checkpointing or without: less GPU memory, slower steps, no CUDA graphs. The memory plan "
        "does so by itself where it must. Nobody has measured it yet.")
    blocks_to_swap: int = setting(
        0, "Blocks to swap", "So many of the UNet's blocks (SDXL has 91, SD1 44) may wait in the computer's memory and come to "
        "the GPU when they are computed: less GPU memory, the same numbers, longer steps, no CUDA graphs. The memory plan "
        "takes no more of them than it must; manual takes all. Off by default: nobody has measured it on a GPU yet.",
        minimum=0, maximum=200, zero="none")
    base_weights: str = setting(
        "as they are", "Base weights", "Hold the model that is trained on in eight bits: on a GPU half the memory of fp16, "
        "without one more than before. The LoRA learns beside weights that are a little off; fp8 is off by a share of each "
        "weight, int8 by one of the largest.",
        choices=("as they are", "fp8", "int8"))
    channels_last: str = setting(
        "auto", "Channels last", "Lay the convolutions' weights out as a GPU's kernels may like them best, which takes a "
        "copy of them. auto is off: nobody has measured it on a GPU yet.", choices=("auto", "off", "on"))
    vae_batch_size: int = setting(
        0, "Encoding batch", "Pictures that the VAE encodes at once, before training: more is faster on a GPU and takes more "
        "memory. Empty or 0 takes what fits into 2 GB, or half of the free GPU memory where that is less, and 1 without a "
        "GPU or where steps encode.", minimum=0, maximum=64, zero="auto")
    cuda_graphs: str = setting(
        "off", "CUDA graphs", "on captures a training step for each shape of pictures, up to 24, and replays it, so that the "
        "GPU never waits for Python; the numbers stay the same. Not where pictures are encoded anew at each step. Captured "
        "steps have memory of their own, which can be a gigabyte. Off by default: nobody has measured it on a GPU yet, and a "
        "capture that fails may leave a torch before 2.13 unfit until the WebUI is started again.",
        choices=("off", "on"))
    torch_compile: bool = setting(
        False, "Compile", "Let torch.compile make the step's kernels: minutes for each shape of pictures, for some speed in a "
        "long run. Needs a compiler; where there is none, or it changes the numbers, the run goes on without. Nobody has "
        "measured a gain yet.")
    yield_to_generations: bool = setting(
        True, "Let generations through", "Work of the WebUI that waits goes first, between two training steps; what is "
        "learnt stays the same. Off makes it wait until the training ends.")


@dataclasses.dataclass(frozen=True)
class EvaluationSettings:
    """What shows whether the LoRA learns: held-out pictures, losses on fixed noise, samples."""

    validation_split: float = setting(
        0.1, "Held-out share", "Share of the pictures that are not trained on, so that they show whether the LoRA learns or "
        "copies: more measures more surely and leaves fewer to learn from. At least 2 are kept back, from 12 pictures on; of "
        "fewer none are, and their mirrored crops are looked at instead. 0 keeps none back.", minimum=0, maximum=0.5,
        step=0.05)
    validation: bool = setting(
        True, "Measure while training", "Compare the LoRA with the base model on fixed noise: the curve in per cent, and the "
        "verdict. What is learnt stays the same, to the bit.")
    validate_every_n_steps: int = setting(
        0, "Measure every n steps", "And at every save. Fewer steps show more of the curve and take more time. Empty or 0 "
        "measures as often as about 4 % of the run allows.", minimum=0, maximum=10_000_000, zero="auto")
    early_stopping: bool = setting(
        False, "Stop when nothing improves", "End and keep the LoRA once its loss on fixed noise has stood still "
        "(arXiv 2302.04841).")
    sample_images: bool = setting(
        True, "Sample while training", "Paint pictures on the way, always from the same seeds. What is learnt stays the "
        "same, to the bit.")
    sample_prompts: str = setting(
        "", "Sample prompts", "One a line, or the path of a text file; with kohya's --w --h --d --l --s --n, and "
        "<lora:name:weight> for other LoRAs. Empty takes the captions of three held-out pictures.", several_lines=True)
    sample_every_n_steps: int = setting(
        0, "Sample every n steps", "Fewer steps paint more often and take more time. Empty or 0 samples as often as costs "
        "about 6 % of the run.", minimum=0, maximum=10_000_000, zero="auto")
    sample_every_n_epochs: int = setting(
        0, "Sample every n epochs", "Goes before the steps; a smaller n paints more often. Empty or 0 leaves it to the steps.",
        minimum=0, maximum=100000, zero="none")
    sample_at_first: bool = setting(
        True, "Sample before the first step", "What the base model paints, to compare with.")


@dataclasses.dataclass(frozen=True)
class SaveSettings:
    """The result."""

    output_name: str = setting(
        "", "Name", "Name of the LoRA: what you will write in <lora:name:1>.", in_view=True)
    output_dir: str = setting(
        "", "Output folder", "Where the file goes. Empty is the folder in which the WebUI looks for LoRAs.", is_path=True)
    overwrite: bool = setting(
        False, "Overwrite", "Replace a LoRA of this name that is already there.")
    save_precision: str = setting(
        "fp16", "Save as", "Number format of the file. fp16 is what everybody uses.", choices=("fp16", "bf16", "float"))
    save_every_n_epochs: int = setting(
        2, "Save every n epochs", "Also keep the LoRA as it is after every n-th epoch, so that the best one can be chosen; "
        "the last is often overtrained. Each is a file of its own, and a smaller n makes more of them. Empty or 0 for none.",
        minimum=0, maximum=100000, zero="none")
    save_every_n_steps: int = setting(
        0, "Save every n steps", "Also keep the LoRA as it is after every n-th step; a smaller n makes more files. Empty or "
        "0 for none.", minimum=0, maximum=10_000_000, zero="none")
    save_state: bool = setting(
        True, "Keep a resume point", "Keep what an interrupted run needs to go on, in the run's folder: the newest only, "
        "with AdamW about six times a LoRA file of fp16. It is removed when the run is done.")
    save_state_every_n_minutes: float = setting(
        5.0, "Resume point every n minutes", "How much work a crash may cost at most: less writes more often. Less often "
        "where writing takes long. 0 keeps one with every save only.", minimum=0, maximum=10000, step=1)
    save_state_on_train_end: bool = setting(
        False, "Keep the resume point at the end", "So that a finished run can go on with more steps.")
    resume: str = setting(
        "", "Resume run", "Go on with an interrupted run: its name in the list of runs, or its folder. Empty begins anew.",
        is_path=True)
    training_comment: str = setting(
        "", "Comment", "A note that is kept inside the file.")
    preset: str = setting(
        "Default", "Preset", "Settings for a purpose. A preset changes only what it is about. The run and the file say which "
        "it was.")
