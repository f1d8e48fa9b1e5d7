"""
Before the first step of a run: checks of the keys, kernels, samples, a drafter.
"""
import os
import shlex
import subprocess
import sys
import tempfile

import torch
import torch._inductor.config

from checkpoint import drafter_config, parse_dtype, step_folders
from configurator import check_ranges
from data.samples import Samples
from formats.files import printable, where
from model import DFlashDraftModel
from tokenizer import tokenizer_fingerprint
from training.optimizer import KINDS
from training.parallel import rank, wait_for_all

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
OUR_DATA = [os.path.join(ROOT, "data", name) for name in ("math240k", "nano", "synthetic")]

# --------------------------------------------------------------------------------------------------
# checks, before anything large is loaded

CHOICES = {
    "weighting": ("decay", "dpace"), "optimizer": KINDS, "parallel": ("ddp", "fsdp")}

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
    check_out_dir(config.out_dir)


def check_out_dir(folder):
    """Make the folder. ValueError if no file can be written there."""
    try:
        os.makedirs(folder, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise ValueError(f"cannot write to out_dir = {folder!r:.100}: {error.strerror}; give "
                         "another --out_dir") from None

# --------------------------------------------------------------------------------------------------
# what a run begins with


def deterministic_kernels():
    """Choose kernels by rule instead of by time, and sum in a fixed order, so that a resumed run
    computes the same. torch warns if it has no deterministic kernel."""
    torch._inductor.config.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new memory costs 5 % and changes no result here
    torch.utils.deterministic.fill_uninitialized_memory = False


def checkpoint_to_resume(config):
    """The checkpoint folder that this run resumes from; None for a new run."""
    out_dir = config.out_dir
    steps = step_folders(out_dir)
    if config.resume and not steps:
        raise ValueError(f"nothing to resume: {where(out_dir)} contains no step-* checkpoint")
    if config.resume:
        return os.path.join(out_dir, steps[-1])
    if steps:
        raise ValueError(f"{where(out_dir)} already contains a run ({steps[-1]}): use --resume to "
                         "continue it or --out_dir for a new one")
    return config.resume_from


def prepare_data(config):
    """Run the data folder's prepare.py if its samples are missing; the other processes wait.

    Only the scripts of this project run: a folder from elsewhere could contain anything.
    """
    script = os.path.join(config.data, "prepare.py")
    is_missing = not os.path.exists(os.path.join(config.data, "meta.json"))
    if rank() == 0 and is_missing and os.path.exists(script):
        arguments = [script, f"--target={config.target}"]
        if os.path.realpath(config.data) not in OUR_DATA:
            raise ValueError(f"no training data in {where(config.data)}. If you trust its script, "
                             f"run it: {shlex.join(['python', *arguments])}")
        print(printable(f"no training data in {config.data}: running {script}"), flush=True)
        if subprocess.run([sys.executable, *arguments]).returncode != 0:
            raise ValueError(f"{where(script)} failed; see its error above")
    wait_for_all()


def load_samples(config, split, vocab_size):
    """The Samples of a split, made with the target's tokenizer and template. ValueError if none of
    them has an anchor (sample_anchors in loss.py), because all losses would be 0."""
    samples = Samples(config.data, split, vocab_size, tokenizer_fingerprint(config.target))
    for _, mask in samples:
        supervised = mask[:config.max_length] > 0
        if (supervised[:-1] & supervised[1:]).any():
            return samples
    raise ValueError(f"no {split} sample in {config.data!r:.60} has two tokens of an answer within "
                     f"max_length = {config.max_length} tokens, so there is nothing to train on")


def new_drafter(config, target_config, tokenizer):
    """An untrained drafter, always the same for a seed.

    Its default mask id is the first one after the tokenizer's, where embeddings have unused rows.
    Without a tokenizer it is the last row of the embedding.
    """
    mask_token_id = config.mask_token_id
    if mask_token_id is None:
        mask_token_id = target_config.vocab_size - 1 if tokenizer is None else len(tokenizer)
    shape = drafter_config(
        target_config,
        num_hidden_layers=config.num_layers,
        target_layer_ids=config.target_layer_ids,
        mask_token_id=mask_token_id,
        num_attention_heads=config.num_heads,
        num_key_value_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        intermediate_size=config.intermediate_size,
        block_size=config.block_size,
        initializer_range=config.initializer_range)
    torch.manual_seed(config.seed)
    return DFlashDraftModel(shape).to(config.device)
