"""
Checks of the keys of train.py, before anything large is loaded.
"""
import os
import tempfile

from checkpoint import parse_dtype
from configurator import check_ranges
from training.optimizer import KINDS

CHOICES = {
    "weighting": ("decay", "dpace"),
    "optimizer": KINDS,
    "parallel": ("ddp", "fsdp"),
}

# the lowest and the highest value of every number
RANGES = {
    "num_layers": (1, 1000), "num_heads": (1, 1000), "num_kv_heads": (1, 1000),
    "head_dim": (2, 1024), "intermediate_size": (1, 10**6), "initializer_range": (1e-6, 10),
    "target_layer_ids": (0, 1000), "block_size": (2, 1024), "mask_token_id": (0, 10**7),
    "num_anchors": (1, 10**6), "gamma": (0.01, 1e6), "batch_size": (1, 10**6),
    "grad_accum_steps": (1, 10**6), "max_length": (2, 10**6), "pad_to_multiple_of": (1, 10**6),
    "bucket_size": (1, 10**6), "epochs": (1e-6, 1e6), "lr": (1e-12, 10), "warmup": (0, 1),
    "betas": (0, 0.999999), "weight_decay": (0, 10), "grad_clip": (1e-6, 1e9),
    "seed": (0, 2**63 - 1), "log_every": (0, 10**9), "eval_every": (0, 10**9),
    "save_every": (0, 10**9), "decode_prompts": (0, 10**6),
}


def check_config(config):
    """ValueError for a configuration that no run can have."""
    for key, allowed in CHOICES.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ValueError(f"{key} = {value!r:.60}: use {' or '.join(allowed)}")
    check_ranges(config, RANGES)
    if config.num_heads % config.num_kv_heads != 0:
        raise ValueError(f"num_heads = {config.num_heads} must be a multiple of num_kv_heads = "
                         f"{config.num_kv_heads}")
    if config.head_dim % 2 != 0:
        raise ValueError(f"head_dim = {config.head_dim}: use an even number")
    if len(config.betas) != 2:
        raise ValueError(f"betas = {config.betas!r:.60}: use two numbers")
    if config.max_length < config.block_size:
        raise ValueError(f"max_length = {config.max_length} is shorter than a block: use "
                         f"block_size = {config.block_size} or more")
    parse_dtype(config.device, config.dtype)


def check_out_dir(folder):
    """Make the folder. ValueError if no file can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to out_dir = {folder!r:.100}: {error.strerror}; give "
                         "another --out_dir") from None


def check_anchors(samples, split, config):
    """ValueError if no sample has an anchor (sample_anchors in loss.py): all losses would be 0."""
    for _, mask in samples:
        supervised = mask[:config.max_length] > 0
        if (supervised[:-1] & supervised[1:]).any():
            return
    raise ValueError(f"no {split} sample in {config.data!r:.60} has two tokens of an answer within "
                     f"max_length = {config.max_length} tokens, so there is nothing to train on")
