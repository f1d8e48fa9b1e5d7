"""
Checks of the keys of train.py, before anything large is loaded.
"""
import math

from training.optimizer import KINDS

CHOICES = {
    "weighting": ("decay", "dpace"),
    "optimizer": KINDS,
    "parallel": ("ddp", "fsdp"),
    "device": ("cpu", "cuda"),
    "dtype": ("float32", "bfloat16"),
}

ABOVE_ZERO = ("initializer_range", "gamma", "epochs", "lr", "grad_clip")

MINIMUM = {
    "num_layers": 1, "num_heads": 1, "num_kv_heads": 1, "head_dim": 2, "intermediate_size": 1,
    "block_size": 2, "num_anchors": 1, "batch_size": 1, "grad_accum_steps": 1, "max_length": 2,
    "pad_to_multiple_of": 1, "bucket_size": 1, "warmup": 0, "weight_decay": 0, "seed": 0,
    "log_every": 1, "eval_every": 1, "save_every": 1, "decode_prompts": 0,
}


def check_config(config):
    """ValueError for a configuration that no run can have."""
    for key, allowed in CHOICES.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ValueError(f"{key} = {value!r}: use {' or '.join(allowed)}")
    for key in ABOVE_ZERO:
        value = getattr(config, key)
        if not 0 < value < math.inf:
            raise ValueError(f"{key} = {value}: use a number above 0")
    for key, minimum in MINIMUM.items():
        value = getattr(config, key)
        if not minimum <= value < math.inf:
            raise ValueError(f"{key} = {value}: use {minimum} or more")
    if config.warmup > 1:
        raise ValueError(f"warmup = {config.warmup}: use a fraction of the steps, 0 to 1")
    if config.num_heads % config.num_kv_heads != 0:
        raise ValueError(f"num_heads = {config.num_heads} must be a multiple of num_kv_heads = "
                         f"{config.num_kv_heads}")
    if config.head_dim % 2 != 0:
        raise ValueError(f"head_dim = {config.head_dim}: use an even number")
    are_valid = [0 <= beta < 1 for beta in config.betas]
    if are_valid != [True, True]:
        raise ValueError(f"betas = {config.betas}: use two numbers of at least 0 and below 1")
