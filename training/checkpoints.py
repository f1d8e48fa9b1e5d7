"""
What a training run writes, and what a resumed run reads: checkpoints and the log.

A checkpoint is a folder out_dir/step-000123. Engines load it as it is; training_state.pt in it is
what resuming needs besides: fp32 weights, since a run resumed from the bf16 ones would be another
run, what the optimizer remembers, the step, and the configuration. Its layout is SpecForge's, so
that runs of SpecForge can be gone on from too.
"""
import argparse
import os
import shutil
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map

from checkpoint import load_drafter, one_line, save_drafter, step_folders
from model import DFlashDraftModel
from training.optimizer import moment_name
from training.parallel import gather_full, rank, shard_like, wait_for_all, world_size

# --------------------------------------------------------------------------------------------------
# writing


def save_checkpoint(run):
    """Write out_dir/step-NNNNNN, whole or not at all; returns the folder.

    Every process has to call it, as weights may be sharded; process 0 writes. The files are the
    same whatever the number of processes.
    """
    config = run.config
    folder = os.path.join(config.out_dir, f"step-{run.step:06d}")
    weights = to_whole_cpu(run.drafter.state_dict())
    moments = to_whole_cpu(run.optimizer.state_dict())
    already_there = os.path.isdir(folder)  # then it is whole, and of this very step
    if rank() == 0 and not already_there:
        state = {
            "epoch": 0,
            "global_step": run.step,
            "args": argparse.Namespace(**vars(config), ranks=world_size()),
            "optimizer_state_dict": moments,
            "scheduler_state_dict": {"last_epoch": run.step},
            "master_weights": weights,
            "gradient_guard": vars(run.guard),
        }
        # a drafter of plain tensors: that of the run may be sharded
        with torch.device("meta"):
            drafter = DFlashDraftModel(run.drafter.config)
        drafter.load_state_dict(weights, assign=True)
        try:
            save_drafter(drafter, folder, model_card(run), {"training_state.pt": state})
        except Exception as error:  # a full disk: OSError, or types of torch's and safetensors' own
            free = shutil.disk_usage(config.out_dir).free / 1e6
            shutil.rmtree(folder + ".part", ignore_errors=True)
            raise ValueError(f"cannot write {folder}, its disk has {free:.1f} MB left "
                             f"({one_line(error)}): make room; what was saved before is untouched, "
                             "--resume goes on from it") from None
        prune_checkpoints(config.out_dir, config.keep_checkpoints)
    wait_for_all()
    return folder


def to_whole_cpu(tree):
    """A nested dict with its tensors gathered from their shards and copied to the CPU."""
    def gather(leaf):
        if isinstance(leaf, torch.Tensor):
            return gather_full(leaf).cpu()
        return leaf
    return tree_map(gather, tree)


def model_card(run):
    config = run.config
    target_name = os.path.basename(os.path.normpath(config.target))
    data_name = os.path.basename(os.path.normpath(config.data))
    return (f"# DFlash drafter for {target_name}\n\n"
            f"Block-diffusion speculative decoding (arXiv 2602.06036): {config.num_layers} layers, "
            f"blocks of {config.block_size}, features of target layers "
            f"{list(config.target_layer_ids)}.\n"
            f"Step {run.step} of {run.total_steps}; data: {data_name}.\n")


def prune_checkpoints(out_dir, keep):
    """Delete all but the newest checkpoints, and what interrupted saves left behind.

    A folder is renamed before it is deleted: half of it would look like a checkpoint.
    """
    for name in step_folders(out_dir)[:-keep]:
        os.replace(os.path.join(out_dir, name), os.path.join(out_dir, name + ".part"))
    for name in os.listdir(out_dir):
        if name.startswith("step-") and name.endswith(".part"):
            shutil.rmtree(os.path.join(out_dir, name))

# --------------------------------------------------------------------------------------------------
# reading

# keys that a resumed run may change and still be the same run
FREE_KEYS = ("resume", "resume_from", "out_dir", "log_every", "eval_every", "eval_samples",
             "save_every", "keep_checkpoints", "decode_prompts", "decode_tokens", "wandb_project",
             "device", "loss_chunk_size", "pad_to_multiple_of", "attention", "compile", "parallel",
             "grad_accum_steps", "ranks")


class SavedRun(NamedTuple):
    """What a checkpoint says of its run, besides the weights."""
    moments: dict           # of the optimizer, by the index of the parameter
    step: int
    guard: dict | None      # of the gradient guard; None if another trainer wrote the checkpoint


def load_training_state(folder, drafter, target_config, config):
    """Put a checkpoint's weights into the drafter; returns the rest as a SavedRun.

    ValueError when the checkpoint is broken, does not fit, or is of a run with other settings:
    going on from it would be a third run, without a word.
    """
    state = read_state_file(folder)
    moments = state["optimizer_state_dict"]["state"]
    is_ours = "master_weights" in state
    if is_ours:
        check_same_run(folder, vars(state["args"]), config)
        weights = state["master_weights"]
        step = state["global_step"]
    else:
        # SpecForge saves no fp32 weights, so the folder's bf16 ones are taken. Its global_step
        # counts micro-batches; AdamW itself counts steps.
        published = load_drafter(folder, target_config)
        if published.config.dflash_config != drafter.config.dflash_config:
            raise ValueError(f"{folder} has {published.config.dflash_config}, "
                             f"this run {drafter.config.dflash_config}")
        weights = published.state_dict()
        step = int(moments[0]["step"])
    try:
        drafter.load_state_dict(weights)
        for i, parameter in enumerate(drafter.parameters()):
            name = moment_name(config.optimizer, parameter)
            if name not in moments[i]:
                raise ValueError(f"it was not trained with optimizer = {config.optimizer!r}")
            shape = moments[i][name].shape
            if shape != parameter.shape:
                raise ValueError(f"moment {i} is {shape}, not {parameter.shape}")
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{folder} does not fit this drafter: {one_line(error)}") from None
    return SavedRun(moments, step, state.get("gradient_guard"))


def read_state_file(folder):
    """training_state.pt of a folder. Nothing but tensors and a Namespace is unpickled."""
    path = os.path.join(folder, "training_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no training_state.pt, so no run can go on from it")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        vars(state["args"])
        memory_of_first = state["optimizer_state_dict"]["state"][0]
        if "master_weights" not in state:
            int(memory_of_first["step"])
        int(state["global_step"])
    except Exception as error:  # torch and pickle raise many types for a broken or a foreign file
        raise ValueError(f"cannot read {path}: {one_line(error)}") from None
    return state


def check_same_run(folder, before, config):
    """ValueError, naming what differs, if a run's configuration was another one than `config`."""
    differences = []
    for key, value in vars(config).items():
        old_value = before.get(key, value)
        if key not in FREE_KEYS and old_value != value:
            differences.append(f"{key} was {old_value!r}, is {value!r}")
    old_batches = before.get("grad_accum_steps", 1) * before.get("ranks", 1)
    batches = config.grad_accum_steps * world_size()
    if old_batches != batches:
        differences.append(f"grad_accum_steps x ranks was {old_batches}, is {batches}")
    if differences:
        raise ValueError(f"{folder} is of another run, --resume cannot go on with it: "
                         f"{'; '.join(differences)}")


def load_moments(optimizer, moments):
    """Put moments, indexed in module order, into an optimizer whose parameters may be sharded."""
    parameters = []
    for group in optimizer.param_groups:
        parameters.extend(group["params"])
    state = {}
    for i, parameter in enumerate(parameters):
        state[i] = {}
        for name, value in moments[i].items():
            is_moment = value.dim() > 0  # "step" is a scalar and stays whole
            state[i][name] = shard_like(value, parameter) if is_moment else value
    settings = optimizer.state_dict()["param_groups"]  # the learning rate and so on are this run's
    optimizer.load_state_dict({"state": state, "param_groups": settings})
