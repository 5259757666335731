"""Several processes that train one LoRA together through torch.distributed.

    launch.py          this process's rank, as torchrun, accelerate or a user's own script set it in the environment
    process_group.py   what the processes ask of each other, and what happens when one of them is lost
"""

from lib_lora_train.distributed.launch import LaunchEnvironment
from lib_lora_train.distributed.process_group import SINGLE_PROCESS, ProcessGroup, ProcessLost, process_group, rows_of

__all__ = ["SINGLE_PROCESS", "LaunchEnvironment", "ProcessGroup", "ProcessLost", "process_group", "rows_of"]
