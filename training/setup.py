"""
Before the first step of a run: samples, a checkpoint to resume from, kernels, a drafter.
"""
import os
import shlex
import subprocess
import sys

import torch
import torch._inductor.config

from checkpoint import drafter_config, newest_checkpoint
from formats.files import printable, where
from model import DFlashDraftModel
from training.parallel import rank, wait_for_all

ROOT = os.path.dirname(os.path.dirname(os.path.realpath(__file__)))
OUR_DATA = [os.path.join(ROOT, "data", name) for name in ("math240k", "nano", "synthetic")]


def deterministic_kernels():
    """Deterministic kernel choice (no autotuning by time) and summation order.

    A resumed run has to choose the same kernels. torch warns if it has no deterministic one.
    """
    torch._inductor.config.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling new memory costs 5 % and changes no result here
    torch.utils.deterministic.fill_uninitialized_memory = False


def checkpoint_to_resume(config):
    """The checkpoint folder that this run resumes from; None for a new run."""
    newest = newest_checkpoint(config.out_dir)  # out_dir itself if it has none
    name = os.path.basename(newest)
    has_checkpoint = name.startswith("step-")
    if has_checkpoint and not config.resume:
        raise ValueError(f"{where(config.out_dir)} already contains a run ({name}): use --resume "
                         "to continue it or --out_dir for a new one")
    if config.resume and not has_checkpoint:
        raise ValueError(f"nothing to resume: {where(config.out_dir)} contains no step-* "
                         "checkpoint")
    return newest if config.resume else config.resume_from


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


def new_drafter(config, target_config, tokenizer):
    """An untrained drafter, always the same for a seed.

    Its mask is by default the first id after the tokenizer's, where embeddings have some unused
    rows, or without a tokenizer the last row.
    """
    vocab_size = target_config.vocab_size
    mask_token_id = config.mask_token_id
    if mask_token_id is None and tokenizer is None:
        mask_token_id = vocab_size - 1
    elif mask_token_id is None:
        mask_token_id = len(tokenizer)
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id = {mask_token_id} is outside the target's vocabulary of "
                         f"{vocab_size}: give an id from 0 to {vocab_size - 1}")
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
