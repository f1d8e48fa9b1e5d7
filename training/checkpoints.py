"""
Checkpoints of a training run.

A checkpoint is a folder out_dir/step-000123. Engines load it as is. Its training_state.pt contains
what resuming also needs: float32 weights (the bfloat16 ones would make a different run), moments,
the step, and the configuration. Its layout is SpecForge's, so runs of SpecForge can be resumed.
"""
import argparse
import os
import re
import secrets
import shutil
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_map, tree_map_only

from checkpoint import load_drafter, public_drafter_config, save_drafter, step_folders
from formats.files import LINE, one_line, short, where
from formats.keys import check_number
from model import DFlashDraftModel
from training.guard import GradientGuard
from training.optimizer import moment_names
from training.parallel import gather_full, rank, shard_like, wait_for_all, world_size

KEEP_CHECKPOINTS = 3  # the newest; older ones are deleted

# --------------------------------------------------------------------------------------------------
# writing


def save_checkpoint(run):
    """Write out_dir/step-NNNNNN, whole or not at all; returns the folder.

    Every process has to call it, because weights can be sharded. The files do not depend on the
    number of processes.
    """
    config = run.config
    name = f"step-{run.step:06d}"
    folder = os.path.join(config.out_dir, name)
    whole = {"drafter": run.drafter.state_dict(), "optimizer": run.optimizer.state_dict()}
    whole = tree_map_only(torch.Tensor, lambda tensor: gather_full(tensor).cpu(), whole)
    if rank() == 0:
        state = {
            "epoch": 0,
            "global_step": run.step,
            "args": argparse.Namespace(**vars(config), ranks=world_size()),
            "optimizer_state_dict": whole["optimizer"],
            "scheduler_state_dict": {"last_epoch": run.step},
            "master_weights": whole["drafter"],
            "gradient_guard": vars(run.guard),
        }
        # a drafter of plain tensors, because the run's can be sharded
        with torch.device("meta"):
            drafter = DFlashDraftModel(run.drafter.config)
        drafter.load_state_dict(whole["drafter"], assign=True)
        if os.path.lexists(folder):  # something else has this name
            os.replace(folder, f"{folder}.{secrets.token_hex(8)}.old")
        save_drafter(drafter, folder, model_card(run), {"training_state.pt": state})
        prune_checkpoints(config.out_dir, name)
    wait_for_all()
    return folder


def model_card(run):
    config = run.config
    target_name = os.path.basename(os.path.normpath(config.target))
    data_name = os.path.basename(os.path.normpath(config.data))
    return f"""# DFlash drafter for {target_name}

Block-diffusion speculative decoding (arXiv 2602.06036): {config.num_layers} layers, blocks of \
{config.block_size}, features of target layers {list(config.target_layer_ids)}.
Step {run.step} of {run.total_steps}; data: {data_name}.
"""


def prune_checkpoints(out_dir, newest):
    """Delete old checkpoints and the remains of interrupted saves. Keep the newest checkpoint.

    A folder is renamed first, because half of a folder would look like a checkpoint.
    """
    for name in step_folders(out_dir)[:-KEEP_CHECKPOINTS]:
        if name != newest:
            path = os.path.join(out_dir, name)
            os.replace(path, f"{path}.{secrets.token_hex(8)}.part")
    for name in os.listdir(out_dir):
        if re.fullmatch(r"step-[0-9]+\.[0-9a-f]{16}\.part", name):
            shutil.rmtree(os.path.join(out_dir, name), ignore_errors=True)

# --------------------------------------------------------------------------------------------------
# reading

# keys that can change in a resumed run, because they do not change what it computes
FREE_KEYS = ("resume", "resume_from", "out_dir", "log_every", "eval_every", "save_every",
             "decode_prompts", "wandb_project", "device", "pad_to_multiple_of", "compile",
             "parallel", "grad_accum_steps")

# type, smallest, and largest value of the numbers in training_state.pt
STATE_NUMBERS = {
    "global_step": (int, 0, 10**9), "usual_norm": (float, 0, 1e30), "skipped": (int, 0, 10**9),
    "skipped_in_a_row": (int, 0, 10**9), "grad_accum_steps": (int, 1, 10**6),
    "ranks": (int, 1, 10**6)}


class SavedRun(NamedTuple):
    """A checkpoint's training state, except the weights."""
    moments: dict           # of the optimizer, by the index of the parameter
    step: int
    guard: GradientGuard


def load_training_state(folder, drafter, target_config, config):
    """Load a checkpoint's weights into the drafter; returns the rest as a SavedRun.

    ValueError if the checkpoint is broken, does not fit, or is from a run with other settings,
    because the result would be neither the old run nor the new one.
    """
    state = read_state_file(folder)
    moments = state["optimizer_state_dict"]["state"]
    is_ours = "master_weights" in state
    if is_ours:
        check_same_run(folder, vars(state["args"]), config)
        weights = state["master_weights"]
        step = state["global_step"]
    else:
        # SpecForge saves no float32 weights, so we take the folder's bfloat16 ones.
        published = load_drafter(folder, target_config)
        theirs = public_drafter_config(published.config)
        ours = public_drafter_config(drafter.config)
        for key in ("dflash_config", "layer_types", "rope_theta", "rms_norm_eps"):
            if theirs[key] != ours[key]:
                raise ValueError(f"{where(folder, 30)}: {key} is {short(theirs[key])}, in this run "
                                 f"it is {short(ours[key])}")
        weights = published.state_dict()
    try:
        drafter.load_state_dict(weights)
        for i, parameter in enumerate(drafter.parameters()):
            if moments[i].keys() != moment_names(config.optimizer, parameter):
                raise ValueError(f"it was not trained with optimizer = {config.optimizer!r}")
            for name, moment in moments[i].items():
                if name != "step" and moment.shape != parameter.shape:
                    raise ValueError(f"moment {i} is {moment.shape}, not {parameter.shape}")
        if not is_ours:
            # SpecForge's global_step counts micro-batches, but AdamW itself counts steps
            step = int(moments[0]["step"])
    except (RuntimeError, ValueError, KeyError) as error:
        raise ValueError(f"{where(folder)} does not fit this drafter: "
                         f"{one_line(error, 110)}") from None
    guard = GradientGuard(**state.get("gradient_guard", {}))  # SpecForge saves none
    return SavedRun(moments, step, guard)


def read_state_file(folder):
    """training_state.pt of a folder. It can contain only tensors and a Namespace."""
    path = os.path.join(folder, "training_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{where(folder)} has no training_state.pt, so it cannot be resumed")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if "draft_state_dict" in state:
            raise ValueError("a newer SpecForge wrote it. Start from the folder that `specforge "
                             "export --to hf` makes")
        moments = state["optimizer_state_dict"]["state"]
        guard = state.get("gradient_guard", {})
        GradientGuard(**guard)
        numbers = vars(state["args"]) | guard | {"global_step": state["global_step"]}
        for key, limits in STATE_NUMBERS.items():
            if key in numbers:
                check_number(key, numbers[key], limits)
        for moment in moments.values():
            check_number("step", float(moment.get("step", 0)), (float, 0, 1e9))
        tree_map(check_tensor, [moments, state.get("master_weights", {})])
    except Exception as error:  # torch and pickle raise many types for a broken or foreign file
        raise ValueError(f"cannot read {where(path)}: {one_line(error, 130)}") from None
    return state


def check_tensor(tensor):
    if tensor.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        raise ValueError(f"a weight or moment is {tensor.dtype}")
    if not tensor.sum().isfinite():
        raise ValueError("a weight or moment is not finite")


def check_same_run(folder, before, config):
    """ValueError, naming the differences, if the saved configuration is of a different run."""
    differences = []
    for key, value in vars(config).items():
        old_value = before.get(key, value)
        is_plain = not isinstance(old_value, torch.Tensor)
        if key not in FREE_KEYS and not (is_plain and old_value == value):
            differences.append(f"{key} was {short(old_value, 20)}, now {short(value, 20)}")
    old_batches = before.get("grad_accum_steps", 1) * before.get("ranks", 1)
    batches = config.grad_accum_steps * world_size()
    if old_batches != batches:
        differences.append(f"grad_accum_steps x processes was {old_batches}, now {batches}")
    if differences:
        raise ValueError(one_line(f"cannot resume {where(folder)}: {len(differences)} settings "
                                  f"changed: {'; '.join(differences[:3])}", LINE))


def load_moments(optimizer, moments):
    """Load moments, indexed in module order, into an optimizer whose parameters can be sharded."""
    state = {}
    for i, parameter in enumerate(optimizer.param_groups[0]["params"]):  # it has one group
        state[i] = {}
        for name, value in moments[i].items():
            is_moment = value.dim() > 0  # "step" is a scalar and is not sharded
            state[i][name] = shard_like(value, parameter) if is_moment else value
    settings = optimizer.state_dict()["param_groups"]  # keep this run's learning rate and so on
    optimizer.load_state_dict({"state": state, "param_groups": settings})
