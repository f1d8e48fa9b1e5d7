"""
Training: batches, one step, and runs that are interrupted, resumed, or shared by processes.
"""
import argparse
import contextlib
import ctypes
import functools
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from safetensors.torch import load_file, save_file
from torch.utils._pytree import tree_leaves

import train
from checkpoint import load_drafter, newest_checkpoint
from configurator import configure
from draft_decode import RoundOutput, generate
from loss import Targets, block_labels, block_loss, chunk_loss, sample_anchors
from target import Target
from tests.common import (
    K, NANO_DRAFTER, NANO_TARGET, ROOT, V, apart, edit_json, nano, nano_copy, phase_1_2, read_jsonl,
    shipped, small_drafter, small_target, tokens_of, write_config)
from tests.conftest import new_small_run
from training import checkpoints, flops, guard, interruption, parallel
from training import log as training_log
from training import setup as training_setup
from training.log import figures

# ------------------------------------------------------------------------------------------------
# whole runs: small ones, on the nano target


class Outcome(NamedTuple):
    """The result of a run: weights, moments, and its log without measured speed."""
    weights: dict
    moments: dict
    log: list


def changed(config, **values):
    """A copy of a configuration with other values."""
    return SimpleNamespace(**vars(config) | values)


def train_into(folder, config, resume=False, draws=False):
    """Train until the end or until something stops it. draws: draw training.png, which takes as
    long as two steps; otherwise the file is empty."""
    run, held_out, _ = train.setup(changed(config, out_dir=str(folder), resume=resume))
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr(Figure, "savefig", lambda figure, file, **options: None)
        train.loop(run, held_out)
    log = read_jsonl(folder / "log.jsonl")
    for entry in log:
        entry.pop("tokens_per_s", None)
        entry.pop("minutes_left", None)
        entry.pop("seconds", None)
    return Outcome(run.drafter.state_dict(), run.optimizer.state_dict()["state"], log)


def assert_same(a, b):
    """Two outcomes are bitwise identical."""
    assert a.log == b.log
    assert a.weights.keys() == b.weights.keys()
    assert len(a.moments) == len(a.weights)
    for name, weight in a.weights.items():
        assert torch.equal(weight, b.weights[name]), name
    for i, moments in a.moments.items():
        for name, moment in moments.items():
            assert torch.equal(moment, b.moments[i][name]), (i, name)


def training_entries(log):
    return [entry for entry in log if entry["kind"] == "train"]


# a server that imports this file once and forks, because the imports take seconds
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(["tests.test_train"])


def start(function, *args):
    """Call a function of this file in a new process."""
    process = FORKS.Process(target=function, args=args, daemon=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", ROOT)
        patch.setenv("CUDA_VISIBLE_DEVICES", "")  # a process that has seen a GPU must not fork
        process.start()
    return process


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(config, folder, Outcome) of a run of 6 steps, which saved steps 3 and 6."""
    folder = tmp_path_factory.mktemp("finished")
    config, _ = new_small_run(folder)
    config.num_anchors = 16
    return config, folder / "whole-dflash", train_into(folder / "whole-dflash", config, draws=True)

# ------------------------------------------------------------------------------------------------
# batches


def test_batches_are_a_function_of_seed_and_number(small_run):
    """Failures 12 and 14: batches depend on the order of calls, or repeat or lack rows."""
    config, rows = small_run
    batches = train.MicroBatches(rows, config)
    in_order = [batches[n] for n in range(20)]
    for n in (13, 2, 19, 2):
        tokens, supervised = train.MicroBatches(rows, config)[n]
        assert torch.equal(tokens, in_order[n][0])
        assert torch.equal(supervised, in_order[n][1])
    numbers = np.concatenate([batches.sample_numbers(n) for n in range(20)]).tolist()
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert numbers[:20] != numbers[20:]
    for i, number in enumerate(batches.sample_numbers(3)):
        row_tokens, _ = rows[number]
        assert batches[3][0][i, :len(row_tokens)].tolist() == row_tokens.tolist()


@pytest.mark.parametrize("max_length", (20, 59, 128))
def test_batches_are_cut_and_padded(small_run, max_length):
    """Failure 14: a sample is not cut at max_length, or its padding is supervised or too long."""
    config, rows = small_run
    config.max_length = max_length
    tokens, supervised = train.pad(rows, config)
    assert tokens.shape == supervised.shape == (20, 64)
    assert (tokens.dtype, supervised.dtype) == (torch.long, torch.bool)
    for i, (row_tokens, row_mask) in enumerate(rows):
        n = min(max_length, len(row_tokens))
        assert tokens[i, :n].tolist() == row_tokens[:n].tolist()
        assert supervised[i, :n].tolist() == (row_mask[:n] > 0).tolist()
        assert not tokens[i, n:].any() and not supervised[i, n:].any()
    config.max_length = 128
    for length, padded in ((1, 64), (64, 64), (65, 128), (999, 128)):
        row = np.ones(length, np.int64)
        assert train.pad([(row, row)], config)[0].shape == (1, padded)


def test_batches_hold_rows_alike_in_length(small_run):
    """Half of a batch is padding, short rows come first, or bucket_size counts samples instead of
    micro-batches."""
    config, _ = small_run
    lengths = np.random.default_rng(0).permutation(400)
    rows = [(np.zeros(length), np.ones(length)) for length in lengths]
    for bucket_size, is_sorted in ((1, False), (100, False), (200, True), (999, True)):
        batches = train.MicroBatches(rows, changed(config, bucket_size=bucket_size))
        pairs = [sorted(lengths[batches.sample_numbers(n)]) for n in range(200)]
        assert all(b - a == 1 for a, b in pairs) == is_sorted, bucket_size
        order = np.corrcoef([longest for _, longest in pairs], range(200))[0, 1]
        assert abs(order) < 0.25

# ------------------------------------------------------------------------------------------------
# one step


class KeepsGradients(torch.optim.SGD):
    """A step changes no weight. It keeps the gradient, as one vector."""
    def step(self):
        parts = [p.grad.flatten() for group in self.param_groups for p in group["params"]]
        self.gradient = torch.cat(parts)


def small_training_run(config, rows):
    """A Run of the small models, whose steps change no weight."""
    rows = [(tokens % V, supervised) for tokens, supervised in rows]
    drafter = small_drafter().requires_grad_()
    run = train.new_run(config, small_target(), drafter, rows)
    run.optimizer = KeepsGradients(drafter.parameters(), 1.0)
    run.total_steps = 10
    return run


def step_of(config, rows):
    """(entry of the log, gradient) of the first step of a run of the small models."""
    run = small_training_run(config, rows)
    entry, _ = train.train_step(run)
    return entry, run.optimizer.gradient


@pytest.mark.parametrize("weighting", ("decay", "dpace"))
def test_step_does_not_depend_on_the_split(small_run, weighting):
    """Failure 13: a mean of means: 1 x 8 rows and 4 x 2 rows have the same loss and gradient. A
    gradient that is clipped before it is divided by the weights almost vanishes."""
    config, rows = small_run
    config.weighting = weighting
    config.grad_clip = 1e9
    rows = rows[:8]  # 64 anchors hold every candidate of them, so both splits have the same
    whole, whole_gradient = step_of(changed(config, batch_size=8, grad_accum_steps=1), rows)
    split_config = changed(config, batch_size=2, grad_accum_steps=4)
    split, split_gradient = step_of(split_config, rows)
    assert whole["grad_norm"] == pytest.approx(whole_gradient.norm().item(), rel=1e-4)
    assert apart(split_gradient, whole_gradient) < 1e-4
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["tau"] == whole["tau"]
    # otherwise a mean of means would pass
    batches = train.MicroBatches(rows, split_config)
    assert len({int(batches[n][1].sum()) for n in range(4)}) > 1

    split_config.grad_clip = split["grad_norm"] / 4
    clipped, clipped_gradient = step_of(split_config, rows)
    assert clipped["grad_norm"] == split["grad_norm"]
    assert apart(4 * clipped_gradient, split_gradient) < 1e-4


@pytest.fixture
def seen(monkeypatch):
    """The last anchors and hidden states of micro_batch_loss, and all anchors of the test."""
    seen = {"all_anchors": []}

    def keep_anchors(*args):
        seen["anchors"], seen["is_valid"] = sample_anchors(*args)
        seen["all_anchors"].append(seen["anchors"].tolist())
        return seen["anchors"], seen["is_valid"]

    def keep_hidden(hidden, *args, **options):
        seen["hidden"] = hidden
        return block_loss(hidden, *args, **options)

    monkeypatch.setattr(train, "sample_anchors", keep_anchors)
    monkeypatch.setattr(train, "block_loss", keep_hidden)
    return seen


@torch.no_grad()
def test_leak_from_features_at_other_places(small_run, seen):
    """Failure 1: features are shifted by one, so a block also sees its anchor's, which was computed
    to predict the first guess; or a block begins with a token that it should guess."""
    config, rows = small_run
    run = small_training_run(config, rows)
    handed_on = []

    def keep(*inputs):
        handed_on.extend(inputs)
        return run.drafter(*inputs)

    tokens, supervised = run.micro_batches[0]
    train.micro_batch_loss(run, tokens, supervised, torch.Generator(), keep)
    features, blocks, anchors, _ = handed_on
    expected, _ = run.target(tokens, target_layer_ids=run.drafter.target_layer_ids)
    assert torch.equal(features, expected)
    assert torch.equal(anchors, seen["anchors"])
    embedding = run.target.embed_tokens.weight
    assert torch.equal(blocks[:, :, 0], embedding[tokens.gather(1, anchors)])
    assert torch.equal(blocks[:, :, 1:], embedding[run.drafter.mask_token_id].expand(
        *blocks[:, :, 1:].shape))


@pytest.mark.parametrize("weighting", ("decay", "dpace"))
def test_step_has_the_loss_of_its_keys(small_run, seen, weighting):
    """decay and dpace are exchanged; gamma, D-PACE's smoothing, or a faster chunk_loss has no
    effect."""
    config, rows = small_run
    config.weighting = weighting
    config.gamma = 3.0
    run = small_training_run(config, rows)

    def doubled(*args, **options):
        nll, *others = chunk_loss(*args, **options)
        return 2 * nll, *others

    run.chunk_loss = doubled
    tokens, supervised = run.micro_batches[0]
    loss, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator(), run.drafter)

    labels, weights = block_labels(
        tokens, supervised, seen["anchors"], seen["is_valid"], K=K, gamma=3.0)
    form = None
    if weighting == "dpace":
        form = functools.partial(chunk_loss, dpace_smoothing=0.5)
    expected, _, _, used = block_loss(
        seen["hidden"], run.target.head_weight, Targets(labels, weights),
        chunk_loss_function=form)
    assert loss.item() == pytest.approx(2 * expected.item())
    assert sums.loss == loss.item()
    assert sums.weight.item() == pytest.approx(used.sum().item())
    assert sums.reached[0] == seen["is_valid"].sum()
    assert sums.tokens == tokens.numel()


def test_step_computes_in_its_dtype(small_run):
    """float32 matmuls instead of bfloat16, or weights in bfloat16."""
    config, rows = small_run
    run = small_training_run(changed(config, dtype="bfloat16"), rows)
    products = []
    run.drafter.fc.register_forward_hook(lambda fc, x, product: products.append(product.dtype))
    train.micro_batch_loss(run, *run.micro_batches[0], torch.Generator(), run.drafter)
    assert products == [torch.bfloat16]
    assert run.drafter.fc.weight.dtype == torch.float32


def test_step_counts_acceptance_up_to_the_end_of_a_response(small_run, monkeypatch):
    """tau lacks the target's own token, or counts guesses after the response. Here all guesses are
    right, and responses of 3 and 9 tokens have 2 + 8 anchors, which reach 1 .. 2 and 1 .. 8
    positions. Without a response tau is 1, not NaN."""
    config, rows = small_run
    run = small_training_run(config, rows)

    def all_right(*args, **options):
        loss, nll, correct, weights = block_loss(*args, **options)
        return loss, nll, torch.ones_like(correct), weights

    monkeypatch.setattr(train, "block_loss", all_right)
    tokens = tokens_of(2, 64)
    supervised = torch.zeros(2, 64, dtype=torch.bool)
    supervised[0, 10:13] = True
    supervised[1, 55:64] = True
    _, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator(), run.drafter)
    assert sums.reached.tolist() == [10, 8, 6, 5, 4, 3, 2, 1] + [0] * 7
    assert sums.right_up_to.tolist() == sums.reached.tolist()
    assert figures(sums)["tau"] == pytest.approx(1 + 39 / 10)
    assert figures(sums)["accepted_up_to_position"] == [1.0] * 8 + [0.0] * 7
    supervised[:] = False
    _, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator(), run.drafter)
    assert figures(sums) == {"loss": 0.0, "tau": 1.0, "accepted_up_to_position": [0.0] * 15}


def test_step_draws_anchors_by_seed_and_batch(small_run, seen):
    """Failure 12: anchors ignore the run's seed or the number of the micro-batch."""
    config, _ = small_run
    config.num_anchors = 4
    row = (tokens_of(60).numpy(), np.ones(60, np.int64))
    for seed in (0, 1, 0):
        run = small_training_run(changed(config, seed=seed), [row] * 8)
        train.train_step(run)
        train.train_step(run)
    drawn = seen["all_anchors"]  # 2 steps of 2 micro-batches for each of the 3 runs
    assert drawn[8:] == drawn[:4]
    assert len({str(anchors) for anchors in drawn[:8]}) == 8


def test_rate_warms_up_and_ends_at_zero(small_run):
    """The learning rate starts at zero, never reaches its peak, or ends above zero."""
    config = changed(small_run[0], lr=2.0, warmup=0.1)
    rates = [train.learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] < 1e-9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_evaluation_is_the_same_every_time(small_run, monkeypatch):
    """Each evaluation has new anchors, whose noise looks like learning; it has a sample too many or
    too few, or is a mean of means."""
    config, rows = small_run
    monkeypatch.setattr(train, "EVAL_SAMPLES", 5)
    run = small_training_run(changed(config, num_anchors=4), rows)
    samples = run.micro_batches.samples
    result = train.evaluate(run, samples)  # two batches of two
    torch.manual_seed(7)
    assert train.evaluate(run, samples) == train.evaluate(run, samples[:4]) == result
    assert train.evaluate(run, samples[2:]) != result
    # samples that do not fill a batch count if there are no others
    assert train.evaluate(run, samples[:1])["loss"] > 0
    # two batches, or one, with every anchor
    losses = []
    for batch_size in (2, 4):
        run = small_training_run(changed(config, batch_size=batch_size), rows)
        losses.append(train.evaluate(run, samples[:4])["loss"])
    assert losses[0] == pytest.approx(losses[1])

# ------------------------------------------------------------------------------------------------
# keys


def test_setup_follows_its_keys(small_run):
    """A key reaches a different part of the drafter; held-out samples are from the training split;
    a dtype, the stop ids, or the number of steps is wrong."""
    config, rows = small_run
    run, held_out, stops = train.setup(
        changed(config, num_layers=2, block_size=8, dtype="bfloat16", initializer_range=0.5))
    drafter = run.drafter
    assert (len(drafter.layers), drafter.block_size, drafter.target_layer_ids) == (2, 8, (1, 3))
    assert drafter.mask_token_id == 507
    layer = drafter.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (4 * 32, 128)
    assert layer.self_attn.k_proj.weight.shape == (2 * 32, 128)
    assert layer.mlp.up_proj.weight.shape == (64, 128)
    assert layer.mlp.up_proj.weight.std().item() == pytest.approx(0.5, rel=0.05)
    assert (len(run.micro_batches.samples), len(held_out), stops) == (len(rows), 3, {502, 504})
    assert run.target.embed_tokens.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in drafter.parameters()} == {torch.float32}
    assert run.total_steps == 6  # 1.2 epochs of 10 micro-batches, 2 per step


@pytest.mark.parametrize("mask_token_id, tokenizer, expected", (
    (None, range(507), 507), (None, None, 511), (0, range(507), 0),
    (None, range(512), None), (512, range(507), None)))
def test_mask_is_the_first_free_id(small_run, mask_token_id, tokenizer, expected):
    """The mask is a token of the text, or outside the embedding."""
    config = changed(small_run[0], mask_token_id=mask_token_id)
    ending = contextlib.nullcontext()
    if expected is None:
        ending = pytest.raises(ValueError, match="mask_token_id = 512 is not one of")
    with ending:
        drafter = training_setup.new_drafter(config, nano()[0].config, tokenizer)
        assert drafter.mask_token_id == expected


def test_device_is_where_the_run_computes(small_run):
    """The drafter or a batch stays on the CPU."""
    config, rows = small_run
    config.device = "meta"
    drafter = training_setup.new_drafter(config, nano()[0].config, None)
    tokens, supervised = train.pad(rows, config)
    assert drafter.fc.weight.is_meta and tokens.is_meta and supervised.is_meta


# what can change in a resumed run without a different result
MAY_CHANGE = {
    "resume", "resume_from", "out_dir",                         # where it continues
    "log_every", "eval_every", "save_every", "decode_prompts", "wandb_project",  # logging
    "device", "compile", "parallel", "pad_to_multiple_of"}      # how it computes


@pytest.mark.parametrize("key", vars(configure(vars(train), [])))
def test_resume_compares_every_key(key):
    """Failure 12: a changed key passes silently, or is refused although no result changes."""
    config = configure(vars(train), [])
    before = vars(config) | {"ranks": 1}
    value = 4 if key == "grad_accum_steps" else "another"
    ending = contextlib.nullcontext()
    if key not in MAY_CHANGE:
        ending = pytest.raises(ValueError, match=f"settings changed: {key}.* was .*, now ")
    with ending:
        checkpoints.check_same_run("a-dflash", before, changed(config, **{key: value}))

# ------------------------------------------------------------------------------------------------
# the log


def test_mfu_of_phase_1_2(monkeypatch):
    """MFU counts wrong operations: per sample, the drafter has 4.2 TFLOP, its attention 1.5, the
    head 7.8, and the target's layers up to the last feature 2.9. It uses the peak of a different
    GPU, of one GPU although there are two, or of bfloat16 in a float32 run."""
    with torch.device("meta"):
        config, drafter = phase_1_2()
        operations = flops.training_operations(drafter, Target(config), 1, 3072, 512)
    assert operations == pytest.approx(13.531e12 + 2.877e12, rel=1e-4)
    monkeypatch.setattr(flops, "world_size", lambda: 2)
    for gpu, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        assert flops.mfu(peak / 2, "cuda", "bfloat16") == 0.25
    assert flops.mfu(1e12, "cuda", "float32") is None
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert flops.mfu(1e12, "cuda", "bfloat16") is None


@pytest.fixture
def wandb(monkeypatch):
    """Replaces the package wandb and keeps its calls."""
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_log_by_hand(small_run, monkeypatch, capsys, wandb):
    """Failure 15: a speed counts steps from before a resume; a fraction or a curve is of a
    different position or key; a run without a project needs wandb, or two processes log to it.
    Steps 10 and 11 of 15 took 50 s, so 2,000 tokens are 40 tokens/s, and 4 steps are left for
    100 s."""
    config, _ = small_run
    os.makedirs(config.out_dir)
    run = SimpleNamespace(config=config, step=9, total_steps=15)
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(training_log.time, "time", lambda: clock.now)
    monkeypatch.setattr(training_log, "peak_memory", lambda device: [1.0, 3.5])
    monkeypatch.setattr(training_log, "mfu", lambda rate, device, dtype: rate / 100)
    log = training_log.TrainingLog(run)
    for _ in range(2):
        log.count(SimpleNamespace(tokens=torch.tensor(1000.0), operations=torch.tensor(625.0)))
    run.step = 11
    clock.now = 1050.0
    fractions = [slot / 100 for slot in range(1, 16)]
    entry = {"lr": 3e-4, "loss": 1.25, "grad_norm": 0.5, "tau": 4.0, "skipped": 2,
             "accepted_up_to_position": fractions}
    log.training(run, dict(entry))
    val = {"loss": 2.5, "tau": 3.0, "accepted_up_to_position": fractions}
    log.held_out(run, val)

    first, second = capsys.readouterr().out.splitlines()
    assert first == ("step 11/15 | loss 1.2500 | tau 4.00 | norm 0.50 | lr 3.0e-04 | 40 tokens/s | "
                     "25.0% MFU | 3.5 GB | 2 skipped | 1.7 min left")
    assert second == ("step 11/15 | held out: loss 2.5000 | tau 3.00 | accepted up to position "
                      "1:0.01 2:0.02 4:0.04 8:0.08 15:0.15")
    training, held_out = read_jsonl(Path(config.out_dir) / "log.jsonl")
    expected = {"kind": "train", "step": 11, "seconds": 50.0, "tokens_per_s": 40.0, "mfu": 0.25,
                "minutes_left": pytest.approx(100 / 60), "peak_gb": [1.0, 3.5]}
    assert training == entry | expected
    assert held_out == val | {"kind": "val", "step": 11}

    # wandb: only on request, and only in process 0
    for project, number in ((None, 0), ("project", 1), ("project", 0)):
        assert wandb.mock_calls == []
        config.wandb_project = project
        monkeypatch.setattr(training_log, "rank", lambda: number)
        training_log.start_wandb(config)
        log.held_out(run, val)
    wandb.init.assert_called_once_with(project="project", name="run-dflash", config=vars(config))
    wandb.log.assert_called_once_with({"val/loss": 2.5, "val/tau": 3.0}, step=11)

    # the plot: the same evaluation three times
    pictures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: pictures.append(figure))
    log.close()
    curves = []
    for axis in pictures[0].axes:
        curves.append({line.get_label(): line.get_ydata().tolist() for line in axis.lines})
    assert curves[:2] == [{"training": [1.25], "held out": [2.5] * 4},
                          {"training": [4.0], "held out": [3.0] * 4}]
    assert curves[2] == {f"position {k}": [k / 100] * 4 for k in (1, 2, 4, 8, 15)}


@pytest.mark.parametrize("log_every, eval_every, save_every, logged, saved", (
    (4, 5, 2, [("train", 4), ("val", 5), ("train", 6), ("val", 6)], [4, 6]),
    (0, 0, 0, [], [6])))
def test_log_and_checkpoints_keep_their_rhythm(
        small_run, monkeypatch, tmp_path, log_every, eval_every, save_every, logged, saved):
    """log_every, eval_every, or save_every is mixed up; 0 is not "never"; the last step is not
    logged; old checkpoints fill the disk; a log needs positions that a block of 8 does not have."""
    config, _ = small_run
    config.block_size = 8
    config.log_every = log_every
    config.eval_every = eval_every
    config.save_every = save_every
    config.num_anchors = 4
    monkeypatch.setattr(checkpoints, "KEEP_CHECKPOINTS", 2)
    outcome = train_into(tmp_path / "a-dflash", config)
    assert [(entry["kind"], entry["step"]) for entry in outcome.log] == logged
    folders = sorted(path.name for path in (tmp_path / "a-dflash").glob("step-*"))
    assert folders == [f"step-{step:06}" for step in saved]


@pytest.mark.parametrize("compiles", (True, False))
def test_train_hands_its_results_on(small_run, monkeypatch, capsys, wandb, compiles):
    """The checkpoint, stop ids, or held-out samples are lost; wandb is not started; nothing is
    compiled before the first step; the summary has a wrong number of prompts."""
    config = changed(small_run[0], wandb_project="project", compile=compiles)
    calls = Mock()
    calls.loop.return_value = "F\x1b[2J"
    calls.decode_held_out.return_value = (2.5, 2)
    for name in ("prepare_for_training", "warm_up", "loop", "decode_held_out"):
        monkeypatch.setattr(train, name, getattr(calls, name))
    train.train(config)
    names = [name for name, _, _ in calls.mock_calls]
    assert names == ["prepare_for_training"] + ["warm_up"] * compiles + ["loop", "decode_held_out"]
    _, folder, held_out, stops = calls.decode_held_out.call_args.args
    assert (folder, len(held_out), stops) == ("F\x1b[2J", 3, {502, 504})
    assert len(calls.loop.call_args.args[1]) == 3
    assert wandb.init.called
    out = capsys.readouterr().out
    assert "tau from real decoding: 2.500 (2 prompts)\n" in out
    assert "\x1b" not in out

# ------------------------------------------------------------------------------------------------
# steps that are skipped


@pytest.fixture
def factors(monkeypatch):
    """Factors of the loss, by step counted from 0; a run ends after two skipped steps in a row."""
    factors = {}
    micro_batch_loss = train.micro_batch_loss

    def faulty(run, *args):
        loss, sums = micro_batch_loss(run, *args)
        return loss * factors.get(run.step, 1), sums

    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    monkeypatch.setattr(guard, "MAX_CONSECUTIVE_SKIPS", 2)
    return factors


@pytest.mark.parametrize("warmup, broken, skipped", (
    (0.2, {1: math.nan, 3: 1e4}, [0, 1, 1, 2, 2, 2]),   # the spike is the resumed run's first step
    (0.5, {0: math.inf, 2: 1e4, 3: 1e7, 5: math.nan}, [1, 1, 1, 2, 2, 3])))  # 3 steps of warm-up
def test_broken_gradients_are_skipped_and_counted(
        small_run, factors, tmp_path, warmup, broken, skipped):
    """Failure 12: a NaN or a spike ruins the weights; a large gradient is skipped during warm-up,
    or not right after it; a good step does not end a row of skips; a resumed run differs."""
    config = changed(small_run[0], warmup=warmup, num_anchors=16)
    factors.update(broken)
    whole = tmp_path / "whole-dflash"
    expected = train_into(whole, config)
    assert [entry["skipped"] for entry in training_entries(expected.log)] == skipped
    assert all(weight.isfinite().all() for weight in expected.weights.values())
    assert expected.moments[0]["step"] == 6 - skipped[-1]
    shutil.rmtree(whole / "step-000006")
    assert_same(train_into(whole, config, resume=True), expected)


def test_usual_gradients_are_a_moving_average():
    """After a large gradient, spikes look usual; a gradient at the limit is skipped; or a skipped
    gradient changes the average."""
    state = guard.GradientGuard()
    for norm, is_skipped in ((2.0, False), (20.0, False), (23.7, True), (math.inf, True),
                             (math.nan, True)):
        assert state.skips(norm, False) == is_skipped
    assert state.usual_norm == pytest.approx(2.36)
    assert state.skipped == state.skipped_in_a_row == 3
    assert not state.skips(23.5, False)
    assert (state.skipped, state.skipped_in_a_row) == (3, 0)
    assert not state.skips(1e6, True)


def test_broken_gradients_end_the_run(small_run, factors, tmp_path, capsys):
    """A run continues for hours with NaN, or an error names the samples of a different step."""
    config, rows = small_run
    factors.update({1: math.nan, 2: math.nan})
    batches = train.MicroBatches(rows, config)
    numbers = batches.sample_numbers(4).tolist() + batches.sample_numbers(5).tolist()
    with pytest.raises(ValueError, match="^stopping at step 3: gradient norm nan "):
        train_into(tmp_path / "b-dflash", config)
    assert f"samples of step 3 (split train): {numbers}\n" in capsys.readouterr().out

# ------------------------------------------------------------------------------------------------
# runs that are interrupted


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_resume_equals_uninterrupted_run(finished, monkeypatch, tmp_path, optimizer):
    """Failure 12: data repeat, or moments or float32 weights are lost; SIGTERM or Ctrl-C loses
    steps; the printed command does not resume the run; a second resume, a longer log with half a
    line, or a signal in the last step ends in something else. Everything is bitwise identical."""
    config, whole, expected = finished
    if optimizer == "adamw":
        with pytest.raises(ValueError, match="already contains a run.*--resume"):
            train_into(whole, config)
        assert newest_checkpoint(str(whole)) == str(whole / "step-000006")
        assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"
        card = (whole / "step-000003" / "README.md").read_text()
        assert card.endswith("Step 3 of 6; data: data.\n")
    else:
        config = changed(config, optimizer=optimizer)
        expected = train_into(tmp_path / "whole-dflash", config)

    folder = tmp_path / "stopped-dflash"
    signals = {1: signal.SIGTERM, 3: signal.SIGINT, 5: signal.SIGTERM}
    train_step = train.train_step

    def stopped_step(run):
        if run.step in signals:
            os.kill(os.getpid(), signals.pop(run.step))
        return train_step(run)

    monkeypatch.setattr(train, "train_step", stopped_step)
    monkeypatch.setattr(sys, "argv", ["train.py", "a \x1b.py", "--resume"])
    for step in (2, 4):
        hint = rf"^stopped at step {step}, .* to .*step-00000{step}. .*'a \\x1b.py' --resume$"
        with pytest.raises(SystemExit, match=hint):
            train_into(folder, config, resume=step > 2)
        lines = (whole / "log.jsonl").read_text().splitlines(True)
        with open(folder / "log.jsonl", "a") as f:
            f.write(lines[-1] + lines[-1][:20])
    assert_same(train_into(folder, config, resume=True), expected)
    assert not signals


def hang(what, errors):
    """Run in a process: get SIGTERM in a step that ends or hangs."""
    sys.stderr = open(errors, "w")
    os.environ |= {"RANK": "1", "TORCHELASTIC_RUN_ID": "any"}
    interruption.PATIENCE_S = 1.0
    with interruption.stop_signals():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.1)
        # like NCCL: a call that Python cannot interrupt. The mutex is never unlocked
        mutex = ctypes.create_string_buffer(128)
        for _ in range(2 if what == "hangs" else 1):
            ctypes.CDLL(None).pthread_mutex_lock(mutex)
    time.sleep(1.5)


@pytest.mark.parametrize("what, status, line", (
    ("hangs", 1, "error: process 1 got SIGTERM, but its step did not finish.*--resume\n"),
    ("ends", 0, "")))
def test_a_process_that_hangs_ends_with_one_line(tmp_path, what, status, line):
    """A process waits in NCCL for a dead one until torchrun kills it silently, or it is killed
    although its step ended in time."""
    process = start(hang, what, tmp_path / "errors")
    process.join(200)
    assert process.exitcode == status
    assert re.fullmatch(line, (tmp_path / "errors").read_text())


def test_resume_after_kill_9(finished, tmp_path):
    """A run does not resume after a real kill -9 at a random moment. For more of them:
    KILLS=20 python test_all.py kill_9"""
    config, _, expected = finished
    config_file = write_config(
        tmp_path / "small.py", changed(config, save_every=1), skip=("out_dir", "resume"))
    r = random.Random(0)
    for kill in range(int(os.environ.get("KILLS", 1))):
        folder = tmp_path / f"{kill}-dflash"
        process = start(train.main, [str(config_file), f"--out_dir={folder}"])
        while process.is_alive() and not folder.exists():
            time.sleep(0.01)
        time.sleep(2 * r.random())
        process.kill()
        process.join()
        has_checkpoint = newest_checkpoint(str(folder)) != str(folder)
        assert_same(train_into(folder, config, resume=has_checkpoint), expected)

# ------------------------------------------------------------------------------------------------
# runs of several processes


def train_as_rank(number, port, config, folder):
    """Run in a process, as by torchrun: four runs that two processes share."""
    os.environ |= {"RANK": str(number), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                   "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    wandb = sys.modules["wandb"] = Mock()
    parallel.join_processes("cpu")
    train_into(folder / "ddp-dflash", changed(config, wandb_project="x"))
    train_into(folder / "fsdp-dflash", changed(config, parallel="fsdp"))
    muon = changed(config, parallel="fsdp", optimizer="muon", epochs=0.6)
    train_into(folder / "muon-dflash", muon)
    if number == 0:
        shutil.copytree(folder / "ddp-dflash/step-000003", folder / "again-dflash/step-000003")
    parallel.wait_for_all()
    train_into(folder / "again-dflash", config, resume=True)
    assert wandb.init.call_count == (number == 0)
    parallel.leave_processes()


def test_ranks_are_the_same_run(small_run, tmp_path):
    """Failures 12 and 13: two processes with DDP or FSDP differ from one process with twice the
    grad_accum_steps; the head of an untied target is sharded; checkpoints do not resume on one
    process, or not bitwise on two; both processes log."""
    config, _ = small_run
    target = nano_copy(tmp_path / "untied", "target")
    weights = load_file(target / "model.safetensors")
    embedding, = [name for name in weights if name.endswith("embed_tokens.weight")]
    weights["lm_head.weight"] = weights[embedding].roll(1, 0).contiguous()
    save_file(weights, target / "model.safetensors", {"format": "pt"})
    edit_json(target / "config.json", tie_word_embeddings=False)
    config.target = str(target)
    config.grad_clip = 0.5
    config.num_anchors = 16
    of_two = changed(config, grad_accum_steps=1)
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = [start(train_as_rank, number, port, of_two, tmp_path) for number in (0, 1)]
    for process in processes:
        process.join(200)
        assert process.exitcode == 0

    one = train_into(tmp_path / "one-dflash", config)
    one_muon = train_into(
        tmp_path / "one_muon-dflash", changed(config, optimizer="muon", epochs=0.6))

    # The losses of all steps, and the acceptance. Muon's matmuls are in bfloat16, and shards are
    # summed in a different order, so a step differs by 3 percent.
    for name, whole, rel in (
            ("ddp", one, 1e-6), ("fsdp", one, 1e-6), ("muon", one_muon, 1e-2)):
        expected = training_entries(whole.log)
        log = training_entries(read_jsonl(tmp_path / f"{name}-dflash" / "log.jsonl"))
        assert len(log) == len(expected) >= 3
        for entry, same in zip(log, expected):
            step = (name, entry["step"])
            assert entry["loss"] == pytest.approx(same["loss"], rel=rel), step
            if rel == 1e-6:
                assert entry["accepted_up_to_position"] == same["accepted_up_to_position"], step

    # two processes, resumed
    states = []
    for name in ("ddp", "again"):
        state = checkpoints.read_state_file(tmp_path / f"{name}-dflash" / "step-000006")
        states.append(tree_leaves([state["master_weights"], state["optimizer_state_dict"]]))
    for a, b in zip(*states, strict=True):
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b

    # two sharded processes, then one
    fsdp = tmp_path / "fsdp-dflash" / "step-000006"
    assert sorted(os.listdir(fsdp)) == sorted(os.listdir(tmp_path / "one-dflash" / "step-000006"))
    assert load_drafter(fsdp, nano()[0].config)
    back = tmp_path / "back-dflash"
    shutil.copytree(tmp_path / "fsdp-dflash" / "step-000003", back / "step-000003")
    resumed = train_into(back, config, resume=True)
    for name, weight in one.weights.items():
        assert apart(resumed.weights[name], weight) < 1e-4, name
    with pytest.raises(ValueError, match="grad_accum_steps x processes was 2, now 1"):
        train_into(back, of_two, resume=True)

# ------------------------------------------------------------------------------------------------
# where a run begins and ends


def test_specforge_checkpoints_are_resumed(finished, tmp_path):
    """Moments belong to different parameters, or micro-batches count as steps; moments of different
    parameters or of AdamW are used. SpecForge saves no float32 weights and counts micro-batches."""
    config, whole, ours = finished
    folder = Path(shutil.copytree(whole / "step-000003", tmp_path / "theirs-dflash"))
    saved = checkpoints.read_state_file(folder)
    assert saved["scheduler_state_dict"] == {"last_epoch": saved["global_step"]}
    state = {
        "epoch": 0,
        "global_step": 6,
        "args": argparse.Namespace(learning_rate=1e-2, output_dir="x"),
        "optimizer_state_dict": saved["optimizer_state_dict"],
        "scheduler_state_dict": {"last_epoch": 2}}
    torch.save(state, folder / "training_state.pt")
    config = changed(config, resume_from=str(folder), out_dir=str(tmp_path / "x-dflash"))
    run, held_out, _ = train.setup(config)
    assert run.step == 3
    for name, weight in run.drafter.named_parameters():
        assert torch.equal(weight, saved["master_weights"][name].bfloat16().float()), name
    train.loop(run, held_out)
    # the same run, except for weights that were rounded to bfloat16
    weights = run.drafter.state_dict()
    assert 0 < max(apart(weights[name], ours.weights[name]) for name in weights) < 0.02

    config.out_dir = str(tmp_path / "y-dflash")
    with pytest.raises(ValueError, match="not trained with optimizer = 'muon'"):
        train.setup(changed(config, optimizer="muon"))
    last = len(ours.moments) - 1
    reversed_moments = {i: ours.moments[last - i] for i in ours.moments}
    torch.save(state | {"optimizer_state_dict": {"state": reversed_moments}},
               folder / "training_state.pt")
    with pytest.raises(ValueError, match="does not fit this drafter: moment 0"):
        train.setup(config)


def test_samples_are_prepared_only_if_they_are_missing(small_run, monkeypatch):
    """Samples are prepared at each start, by every process, or for a different target; a failed
    preparation is ignored; a script from elsewhere runs."""
    config, _ = small_run
    folder = Path(config.data)
    script = folder / "prepare.py"
    ran = folder / "ran"
    script.write_text(f"import sys; open({str(ran)!r}, 'w').write(str(sys.argv[1:]))")
    monkeypatch.setattr(training_setup, "OUR_DATA", [str(folder.resolve())])
    training_setup.prepare_data(config)  # the samples are there
    (folder / "meta.json").unlink()
    for name, value in (("OUR_DATA", []), ("rank", lambda: 1)):
        with monkeypatch.context() as patch:
            patch.setattr(training_setup, name, value)
            ending = contextlib.nullcontext()
            if name == "OUR_DATA":
                ending = pytest.raises(ValueError, match="If you trust .*: python .*prepare.py --t")
            with ending:
                training_setup.prepare_data(config)
    assert not ran.exists()
    training_setup.prepare_data(config)
    assert ran.read_text() == f"['--target={NANO_TARGET}']"
    script.write_text("raise SystemExit(1)")
    with pytest.raises(ValueError, match="prepare.py failed"):
        training_setup.prepare_data(config)


def test_rows_of_another_template_are_refused(small_run, tmp_path):
    """Failure 9: rows of a different tokenizer or chat template train silently."""
    config, _ = small_run
    target = nano_copy(tmp_path / "target", "target")
    template = target / "chat_template.jinja"
    template.write_text(template.read_text() + "\n")
    with pytest.raises(ValueError, match="another tokenizer or chat template"):
        train.setup(changed(config, target=str(target)))


def test_held_out_prompts_are_decoded(small_run, monkeypatch, capsys):
    """Failure 15: a prompt contains tokens of its answer, or ends in the second of two answers; tau
    counts the prefill's token; a dtype, a limit, or stop ids have no effect; a prompt that fills
    the context ends a run of hours in an error."""
    config, rows = small_run
    config.decode_prompts = 5  # of six samples
    config.dtype = "bfloat16"
    monkeypatch.setattr(train, "DECODE_TOKENS", 12)
    monkeypatch.setattr(train, "DECODE_SLOTS", 1)
    tokens, supervised = rows[0]
    two_answers = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    rows = [(tokens, supervised), (np.arange(8), two_answers)]
    expected_prompts = [tokens[supervised == 0].tolist(), [0, 1, 2]]
    longest = 1024 - K - 1
    for length in (0, longest + 1, longest, 3):
        rows.append((np.ones(length + 2, int), np.arange(length + 2) >= length))
    expected_prompts.append([1] * longest)
    next(generate(nano()[0], shipped(), expected_prompts[-1]))  # it can be decoded

    def three_rounds(target, drafter, prompts, **options):
        assert target.embed_tokens.weight.dtype == drafter.fc.weight.dtype == torch.bfloat16
        assert prompts == expected_prompts
        assert options == {"max_new_tokens": 12, "slots": 1, "stop_token_ids": {999}}
        for index, lengths in enumerate(((1, 4, 7), (1, 11), (1,))):
            for length in lengths:
                yield index, RoundOutput([5] * length)

    monkeypatch.setattr(train, "generate_many", three_rounds)
    tau, prompts = train.decode_held_out(config, NANO_DRAFTER, rows, stops={999})
    assert tau == pytest.approx((4 + 7 + 11) / 3)
    assert prompts == 3
    assert capsys.readouterr().out.count(": skipped") == 2

    config.decode_prompts = 50  # more than there are
    monkeypatch.setattr(train, "generate_many", lambda target, drafter, prompts, **options: [])
    assert train.decode_held_out(config, NANO_DRAFTER, rows, stops=())[1] == 4

# ------------------------------------------------------------------------------------------------
# every key has an effect: a new key must join one of the tables

CHANGES = {  # values that change the first step of a run
    "num_layers": 2, "num_heads": 2, "num_kv_heads": 1, "head_dim": 16, "intermediate_size": 32,
    "initializer_range": 0.1, "target_layer_ids": (1, 4), "block_size": 8, "mask_token_id": 500,
    "num_anchors": 3, "weighting": "dpace", "gamma": 1.0, "batch_size": 3, "grad_accum_steps": 2,
    "max_length": 20, "pad_to_multiple_of": 32, "bucket_size": 1, "epochs": 3.0, "lr": 1e-3,
    "warmup": 0.6, "optimizer": "muon", "betas": (0.5, 0.9), "weight_decay": 5.0,
    "grad_clip": 0.01, "seed": 1, "dtype": "bfloat16"}
OTHER_EFFECTS = {  # the test of the key
    "target": test_rows_of_another_template_are_refused,
    "data": test_samples_are_prepared_only_if_they_are_missing,
    "out_dir": test_log_and_checkpoints_keep_their_rhythm,
    "resume": test_resume_equals_uninterrupted_run,
    "resume_from": test_specforge_checkpoints_are_resumed,
    "log_every": test_log_and_checkpoints_keep_their_rhythm,
    "eval_every": test_log_and_checkpoints_keep_their_rhythm,
    "save_every": test_log_and_checkpoints_keep_their_rhythm,
    "decode_prompts": test_held_out_prompts_are_decoded,
    "wandb_project": test_log_by_hand,
    "device": test_device_is_where_the_run_computes,
    "compile": test_train_hands_its_results_on,
    "parallel": test_ranks_are_the_same_run}


def test_every_key_is_in_one_of_the_tables():
    assert sorted([*CHANGES, *OTHER_EFFECTS]) == sorted(vars(configure(vars(train), [])))


def first_step(config):
    """All that the first step of a run shows, and the length of the run."""
    run, _, _ = train.setup(config)
    entry, sums = train.train_step(run)
    leaves = tree_leaves([run.drafter.state_dict(), run.optimizer.state_dict()["state"]])
    return run.total_steps, entry, sums.tokens.item(), [leaf.tolist() for leaf in leaves]


@pytest.fixture(scope="module")
def unchanged(finished, tmp_path_factory):
    """(config, its first step)."""
    config = changed(finished[0], out_dir=str(tmp_path_factory.mktemp("first-dflash")),
                     grad_accum_steps=1)
    return config, first_step(config)


@pytest.mark.parametrize("key", ("out_dir", *CHANGES))
def test_every_key_has_an_effect(unchanged, tmp_path, key):
    """A key is read, checked, and saved, but nothing follows from it."""
    config, expected = unchanged
    value = CHANGES.get(key, str(tmp_path))  # a different out_dir changes no step
    has_effect = first_step(changed(config, **{key: value})) != expected
    assert has_effect == (key in CHANGES)
