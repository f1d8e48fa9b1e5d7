"""
Training: batches, one step, and runs that are interrupted, resumed, or shared by processes.
"""
import argparse
import contextlib
import functools
import itertools
import math
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch.utils._pytree import tree_leaves

import train
from checkpoint import load_drafter, newest_checkpoint
from configurator import configure
from draft_decode import RoundOutput, generate
from loss import Targets, block_labels, block_loss, chunk_loss, sample_anchors
from target import Target
from tests.common import (
    K, NANO_DRAFTER, NANO_TARGET, ROOT, V, apart, nano, nano_copy, phase_1_2, read_jsonl, shipped,
    small_config, small_drafter, small_target, tokens_of, write_config)
from training import checkpoints, flops, guard
from training import log as training_log
from training import setup as training_setup
from training.flops import training_operations
from training.sums import acceptance

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
    return Outcome(run.drafter.state_dict(), run.optimizer.state_dict()["state"], log)


def assert_same(a, b):
    """Two outcomes are bitwise identical."""
    assert a.log == b.log
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        assert torch.equal(weight, b.weights[name]), name
    assert a.moments.keys() == b.moments.keys()
    assert len(a.moments) == len(a.weights)
    for i, moments in a.moments.items():
        for name, moment in moments.items():
            assert torch.equal(moment, b.moments[i][name]), (i, name)


def training_entries(log):
    return [entry for entry in log if entry["kind"] == "train"]

# ------------------------------------------------------------------------------------------------
# batches


def test_batches_are_a_function_of_seed_and_number(small_run):
    """Failures 12 and 14: batches depend on the order of calls, repeat or lack rows, or have many
    different lengths."""
    config, rows = small_run
    batches = train.MicroBatches(rows, config)
    in_order = [batches[n] for n in range(20)]
    for n in (13, 2, 19, 2):
        tokens, supervised = train.MicroBatches(rows, config)[n]
        assert torch.equal(tokens, in_order[n][0])
        assert torch.equal(supervised, in_order[n][1])
        assert tokens.shape == supervised.shape == (2, 64)
    numbers = np.concatenate([batches.sample_numbers(n) for n in range(20)]).tolist()
    assert sorted(numbers[:20]) == sorted(numbers[20:]) == list(range(20))
    assert numbers[:20] != numbers[20:]
    other = train.MicroBatches(rows, changed(config, seed=1))
    assert other.sample_numbers(0).tolist() != batches.sample_numbers(0).tolist()
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
    assert tokens.dtype == torch.long
    assert supervised.dtype == torch.bool
    for i, (row_tokens, row_mask) in enumerate(rows):
        n = min(max_length, len(row_tokens))
        assert tokens[i, :n].tolist() == row_tokens[:n].tolist()
        assert supervised[i, :n].tolist() == (row_mask[:n] > 0).tolist()
        assert not tokens[i, n:].any()
        assert not supervised[i, n:].any()
    config.max_length = 128
    for length, padded in ((1, 64), (63, 64), (64, 64), (65, 128), (128, 128), (999, 128)):
        row = np.ones(length, np.int64)
        tokens, _ = train.pad([(row, row)], config)
        assert tokens.shape == (1, padded), length


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
        parts = []
        for group in self.param_groups:
            parts += [p.grad.flatten() for p in group["params"]]
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
    """Failure 13: a mean of means. 1 x 8 rows and 4 x 2 rows have the same loss and gradient."""
    config, rows = small_run
    config.weighting = weighting
    config.grad_clip = 1e9
    rows = rows[:8]  # 64 anchors hold every candidate of them, so both splits have the same
    whole, whole_gradient = step_of(changed(config, batch_size=8, grad_accum_steps=1), rows)
    split_config = changed(config, batch_size=2, grad_accum_steps=4)
    split, split_gradient = step_of(split_config, rows)
    assert whole_gradient.norm() > 0
    assert apart(split_gradient, whole_gradient) < 1e-4
    assert split["loss"] == pytest.approx(whole["loss"], rel=1e-5)
    assert split["tau"] == whole["tau"]
    # otherwise a mean of means would pass
    batches = train.MicroBatches(rows, split_config)
    counts = {int(batches[n][1].sum()) for n in range(4)}
    assert len(counts) > 1


def test_step_divides_gradients_before_it_clips_them(small_run):
    """A gradient is clipped as a sum and then divided by the weights, so it almost vanishes."""
    config, rows = small_run
    config.grad_clip = 1e9
    entry, gradient = step_of(config, rows)
    assert entry["grad_norm"] == pytest.approx(gradient.norm().item(), rel=1e-4)
    config.grad_clip = gradient.norm().item() / 4
    clipped_entry, clipped = step_of(config, rows)
    assert clipped_entry["grad_norm"] == pytest.approx(entry["grad_norm"])
    assert apart(4 * clipped, gradient) < 1e-4


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


def test_leak_from_future_tokens_through_the_whole(small_run, seen):
    """Failure 1: tokens after the anchor affect its guesses, through features or ids; or the anchor
    and the token before it do not."""
    config, rows = small_run
    config.num_anchors = 6
    run = small_training_run(config, rows)
    supervised = torch.zeros(1, 130, dtype=torch.bool)
    supervised[:, 20:] = True

    def hidden_of(tokens):
        generator = torch.Generator().manual_seed(0)
        train.micro_batch_loss(run, tokens, supervised, generator)
        return seen["hidden"]

    x = tokens_of(1, 130)
    clean = hidden_of(x)
    for i, n in enumerate(seen["anchors"][0].tolist()):
        later = x.clone()
        later[:, n + 1:] = tokens_of(1, 129 - n, seed=1)
        assert torch.equal(hidden_of(later)[:, i], clean[:, i]), n
        for seen_position in (n - 1, n):
            other = x.clone()
            other[:, seen_position] = (x[:, seen_position] + 1) % V
            assert apart(hidden_of(other)[:, i], clean[:, i]) > 1e-3, n


@torch.no_grad()
def test_leak_from_features_at_other_places(small_run):
    """Failure 1: features are shifted by one, so a block also sees its anchor's, which was computed
    to predict the first guess."""
    config, rows = small_run
    run = small_training_run(config, rows)
    handed_on = []

    def keep(features, *others):
        handed_on.append(features)
        return run.drafter(features, *others)

    tokens, supervised = run.micro_batches[0]
    train.micro_batch_loss(run, tokens, supervised, torch.Generator(), keep)
    features, _ = run.target(tokens, target_layer_ids=run.drafter.target_layer_ids)
    assert torch.equal(handed_on[0], features)


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
    loss, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator())

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


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16))
def test_step_hands_its_keys_on(small_run, seen, dtype):
    """A key has no effect: other anchors, or float32 matmuls instead of bfloat16."""
    config, rows = small_run
    config.num_anchors = 5
    config.max_length = 77
    config.dtype = str(dtype).removeprefix("torch.")
    run = small_training_run(config, rows)
    products = []
    run.drafter.fc.register_forward_hook(lambda fc, x, product: products.append(product.dtype))
    tokens, supervised = run.micro_batches[0]
    train.micro_batch_loss(run, tokens, supervised, torch.Generator().manual_seed(3))
    anchors, _ = sample_anchors(supervised, 5, torch.Generator().manual_seed(3), 77)
    assert torch.equal(seen["anchors"], anchors)
    assert products == [dtype]
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
    _, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator())
    assert sums.reached.tolist() == [10, 8, 6, 5, 4, 3, 2, 1] + [0] * 7
    assert sums.right_up_to.tolist() == sums.reached.tolist()
    tau, accepted_up_to_slot = acceptance(sums)
    assert tau == pytest.approx(1 + 39 / 10)
    assert accepted_up_to_slot == [1.0] * 8 + [0.0] * 7
    supervised[:] = False
    _, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator())
    assert acceptance(sums) == (1.0, [0.0] * 15)


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
    assert len(drawn) == 12
    assert drawn[8:] == drawn[:4]
    for i, j in itertools.combinations(range(8), 2):
        assert drawn[i] != drawn[j], (i, j)


def test_setup_follows_its_keys(small_run):
    """A key does not reach the drafter or the optimizer; weights do not depend on the seed;
    held-out samples are from the training split; a dtype or the number of steps is wrong."""
    config, rows = small_run
    config.decode_prompts = 0  # none are decoded
    config.num_layers = 2
    config.block_size = 8
    config.dtype = "bfloat16"
    config.initializer_range = 0.5
    config.betas = (0.8, 0.95)
    config.weight_decay = 0.03
    run, held_out, stops = train.setup(config)
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
    assert type(run.optimizer) is torch.optim.AdamW
    group, = run.optimizer.param_groups
    assert (group["betas"], group["weight_decay"], group["lr"]) == ((0.8, 0.95), 0.03, config.lr)
    assert run.total_steps == 6  # 1.2 epochs of 10 micro-batches, 2 per step

    same, _, _ = train.setup(config)
    other, _, _ = train.setup(changed(config, seed=1))
    assert torch.equal(same.drafter.fc.weight, drafter.fc.weight)
    assert not torch.equal(other.drafter.fc.weight, drafter.fc.weight)


def test_rate_warms_up_and_ends_at_zero(small_run):
    """The learning rate starts at zero, never reaches its peak, ends above zero, or does not reach
    the optimizer; gradients are left over for the next step."""
    config, rows = small_run
    config.lr = 2.0
    config.warmup = 0.1
    config.num_anchors = 4
    rates = [train.learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] < 1e-9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)

    run = small_training_run(config, rows)
    for step in range(run.total_steps):
        entry, _ = train.train_step(run)
        rate = train.learning_rate(step, run.total_steps, config)
        assert entry["lr"] == run.optimizer.param_groups[0]["lr"] == rate
        assert all(parameter.grad is None for parameter in run.drafter.parameters())


@pytest.mark.parametrize("mask_token_id, tokenizer, expected", (
    (None, range(507), 507),    # of a tokenizer only the length counts
    (None, None, 511), (0, range(507), 0),
    (None, range(512), None), (512, range(507), None), (-1, range(507), None)))
def test_mask_is_the_first_free_id(small_run, mask_token_id, tokenizer, expected):
    """The mask is a token of the text, or outside the embedding."""
    config, _ = small_run
    config.mask_token_id = mask_token_id
    ending = contextlib.nullcontext()
    if expected is None:
        ending = pytest.raises(ValueError, match="mask_token_id = -?[0-9]+ is not one of")
    with ending:
        drafter = training_setup.new_drafter(config, nano()[0].config, tokenizer)
        assert drafter.mask_token_id == expected


def test_evaluation_is_the_same_every_time(small_run, monkeypatch):
    """Each evaluation has new anchors, whose noise looks like learning; it has a sample too many or
    too few, or is a mean of means."""
    config, rows = small_run
    config.num_anchors = 4
    monkeypatch.setattr(train, "EVAL_SAMPLES", 5)  # two batches of two
    run = small_training_run(config, rows)
    samples = run.micro_batches.samples
    result = train.evaluate(run, samples)
    torch.manual_seed(7)
    assert train.evaluate(run, samples) == train.evaluate(run, samples[:4]) == result
    assert train.evaluate(run, samples[2:]) != result
    # samples that do not fill a batch count if there are no others
    assert train.evaluate(run, samples[:1])["loss"] > 0

    sums = []
    for first in (0, 2):
        tokens, supervised = train.pad(samples[first:first + 2], config)
        generator = torch.Generator().manual_seed(first)
        sums.append(train.micro_batch_loss(run, tokens, supervised, generator)[1])
    loss = (sums[0].loss + sums[1].loss) / (sums[0].weight + sums[1].weight)
    assert result["loss"] == pytest.approx(loss.item())


def test_operations_are_those_of_phase_1_2():
    """MFU counts wrong operations. Per sample, the drafter has 4.2 TFLOP, its attention 1.5, the
    head 7.8, and the target's layers up to the last feature 2.9."""
    with torch.device("meta"):
        config, drafter = phase_1_2()
        target = Target(config)
    alone = training_operations(drafter, 1, 3072, 512)
    both = training_operations(drafter, 1, 3072, 512, target)
    assert alone == pytest.approx(13.53e12, rel=1e-3)
    assert both - alone == pytest.approx(2.877e12, rel=1e-3)


def test_mfu_counts_the_frozen_target_by_hand():
    """The target's attention or delta rule is left out, counted in the wrong layers, with a
    backward, with all pairs of tokens instead of the causal ones, or with exchanged widths."""
    config = replace(small_config("untied"), linear_key_head_dim=8)
    target = Target(config)
    drafter = small_drafter()  # its last feature layer is 6: one full layer and six linear ones
    matrices = 7 * 3 * 64 * 96                              # MLPs
    matrices += 64 * (2 * 128 + 64 + 64) + 128 * 64         # q and its gate, k, v; o
    matrices += 6 * (64 * (2 * 32 + 192 + 192 + 2 * 8) + 192 * 64)   # q, k, v, z, a, b; out
    pairs = 19 * 20 // 2
    attention = pairs * 4 * (2 * 32 + 2 * 32)               # 4 heads: a score and a sum
    two_chunks = 2 * 8 * (6 * 16 * 16 * 8 + 4 * 16 * 16 * 24 + 6 * 16 * 8 * 24 + 16 ** 3)
    expected = 3 * (2 * matrices * 19 + attention + 6 * two_chunks)
    alone = training_operations(drafter, 3, 19, 5)
    assert training_operations(drafter, 3, 19, 5, target) - alone == expected


def test_operations_as_a_share_of_the_peak(monkeypatch):
    """MFU uses the peak of a different GPU, of one GPU although there are two, or of bfloat16 in a
    float32 run."""
    for gpu, peak in (("NVIDIA H100 80GB HBM3", 989e12), ("NVIDIA H100 PCIe", 756e12)):
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
        assert flops.mfu(peak / 4, "cuda", "bfloat16") == 0.25
    assert flops.mfu(1e12, "cuda", "float32") is None
    assert flops.mfu(1e12, "cpu", "bfloat16") is None
    monkeypatch.setattr(flops, "world_size", lambda: 2)
    assert flops.mfu(756e12 / 2, "cuda", "bfloat16") == 0.25
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert flops.mfu(1e12, "cuda", "bfloat16") is None

# ------------------------------------------------------------------------------------------------
# the log


@pytest.fixture
def wandb(monkeypatch):
    """Replaces the package wandb and keeps its calls."""
    wandb = Mock()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_wandb_is_used_only_on_request_and_by_process_0(small_run, monkeypatch, wandb):
    """A run without a project needs wandb, two processes log the same numbers, or a missing package
    ends in a traceback."""
    config, _ = small_run
    run = SimpleNamespace(config=config, step=1, total_steps=2)
    os.makedirs(config.out_dir)
    log = training_log.TrainingLog(run)
    for project, number in ((None, 0), ("project", 1)):
        config.wandb_project = project
        monkeypatch.setattr(training_log, "rank", lambda: number)
        training_log.start_wandb(config)
        log.write(run, "train", {"loss": 1.0}, "a line")
    assert wandb.mock_calls == []
    monkeypatch.setattr(training_log, "rank", lambda: 0)
    training_log.start_wandb(config)
    wandb.init.assert_called_once_with(project="project", name="run-dflash", config=vars(config))
    monkeypatch.setitem(sys.modules, "wandb", None)  # then its import fails
    with pytest.raises(ValueError, match="^wandb_project = 'project' .*pip install wandb"):
        training_log.start_wandb(config)


def test_log_by_hand(small_run, monkeypatch, capsys, wandb):
    """Failure 15: a speed counts steps from before a resume, or a fraction is of a different
    position. Steps 10 and 11 of 15 took 50 s, so 2,000 tokens are 40 tokens/s, and 4 steps are left
    for 100 s."""
    config, _ = small_run
    os.makedirs(config.out_dir)
    config.wandb_project = "project"
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
             "accepted_up_to_slot": fractions}
    log.training(run, entry)
    log.held_out(run, {"loss": 2.5, "tau": 3.0, "accepted_up_to_slot": fractions})
    log.close()

    first, second = capsys.readouterr().out.splitlines()
    assert "| 40 tokens/s | 25.0% MFU | 3.5 GB | 2 skipped | 1.7 min left" in first
    assert second.endswith("1:0.01 2:0.02 4:0.04 8:0.08 15:0.15")
    training, held_out = read_jsonl(Path(config.out_dir) / "log.jsonl")
    expected = {"kind": "train", "step": 11, "tokens_per_s": 40.0, "mfu": 0.25,
                "minutes_left": pytest.approx(100 / 60), "peak_gb": [1.0, 3.5]}
    assert training == entry | expected
    assert (held_out["kind"], held_out["accepted_up_to_slot"]) == ("val", fractions)
    wandb.log.assert_called_with({"val/loss": 2.5, "val/tau": 3.0}, step=11)


def test_plot_by_hand(monkeypatch, tmp_path):
    """A curve has the wrong key, position, label, or kind of entry."""
    log = [{"kind": "train", "step": 1, "loss": 5.0, "tau": 6.0},
           {"kind": "val", "step": 2, "loss": 7.0, "tau": 8.0, "accepted_up_to_slot": [3, 2, 1]}]
    figures = []
    monkeypatch.setattr(Figure, "savefig", lambda figure, *_, **options: figures.append(figure))
    training_log.plot_training(str(tmp_path / "training.png"), log, (1, 3))
    curves = []
    for axis in figures[0].axes:
        curves.append({line.get_label(): line.get_xydata().tolist() for line in axis.lines})
    assert curves == [
        {"training": [[1, 5]], "held out": [[2, 7]]},
        {"training": [[1, 6]], "held out": [[2, 8]]},
        {"position 1": [[2, 3]], "position 3": [[2, 1]]}]


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
    config, _ = small_run
    config.wandb_project = "project"
    config.decode_prompts = 5  # of 3 held-out samples
    config.compile = compiles
    done = []

    def keep_loop(run, held_out):
        done.append(len(held_out))
        return "F\x1b[2J"

    def keep_decoding(config, folder, samples, stops):
        done.append((folder, len(samples), stops))
        return 2.5, 2

    monkeypatch.setattr(train, "prepare_for_training", lambda run: None)
    monkeypatch.setattr(train, "warm_up", lambda run, loss: done.append("compiled"))
    monkeypatch.setattr(train, "loop", keep_loop)
    monkeypatch.setattr(train, "decode_held_out", keep_decoding)
    train.train(config)
    assert done == ["compiled"] * compiles + [3, ("F\x1b[2J", 3, {502, 504})]
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

    def faulty(run, *args, **options):
        loss, sums = micro_batch_loss(run, *args, **options)
        return loss * factors.get(run.step, 1), sums

    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    monkeypatch.setattr(guard, "MAX_CONSECUTIVE_SKIPS", 2)
    return factors


@pytest.mark.parametrize("warmup, broken, skipped", (
    (0.2, {1: math.nan, 3: 1e4}, [0, 1, 1, 2, 2, 2]),   # the spike is the resumed run's first step
    (0.2, {0: math.nan, 2: math.inf, 4: 1e4}, [1, 1, 2, 2, 3, 3]),
    (0.5, {0: math.nan, 2: 1e4, 3: 1e7, 5: math.nan}, [1, 1, 1, 2, 2, 3])))  # 3 steps of warm-up
def test_broken_gradients_are_skipped_and_counted(
        small_run, factors, tmp_path, warmup, broken, skipped):
    """Failure 12: a NaN or a spike ruins the weights; a large gradient is skipped during warm-up,
    or not right after it; a good step does not end a row of skips; a resumed run differs."""
    config, _ = small_run
    config.warmup = warmup
    factors.update(broken)
    whole = tmp_path / "whole-dflash"
    expected = train_into(whole, config)
    assert [entry["skipped"] for entry in training_entries(expected.log)] == skipped
    assert all(weight.isfinite().all() for weight in expected.weights.values())
    assert expected.moments[0]["step"] == 6 - skipped[-1]

    resumed = tmp_path / "resumed-dflash"
    shutil.copytree(whole / "step-000003", resumed / "step-000003")
    shutil.copy(whole / "log.jsonl", resumed)
    assert_same(train_into(resumed, config, resume=True), expected)


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
def test_resume_equals_uninterrupted_run(small_run, tmp_path, optimizer):
    """Failure 12: data repeat, or moments or float32 weights are lost. Everything is bitwise
    identical, even the log, after a crash that left a longer log with half a line."""
    config, _ = small_run
    config.optimizer = optimizer
    whole = tmp_path / "whole-dflash"
    expected = train_into(whole, config, draws=True)
    assert newest_checkpoint(str(whole)) == str(whole / "step-000006")
    with pytest.raises(ValueError, match="already contains a run.*--resume"):
        train_into(whole, config)
    assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"
    assert (whole / "step-000003" / "README.md").read_text().endswith("Step 3 of 6; data: data.\n")

    crashed = tmp_path / "crashed-dflash"
    shutil.copytree(whole / "step-000003", crashed / "step-000003")
    lines = (whole / "log.jsonl").read_text().splitlines(True)
    (crashed / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    assert_same(train_into(crashed, config, resume=True), expected)


@pytest.mark.parametrize("number, step", ((signal.SIGTERM, 3), (signal.SIGINT, 5)))
def test_resume_after_a_signal(small_run, monkeypatch, tmp_path, number, step):
    """Failure 12: SIGTERM or Ctrl-C loses steps, its command does not resume the run, or a run that
    ends with this step claims to be unfinished."""
    config, _ = small_run
    expected = train_into(tmp_path / "whole-dflash", config)
    folder = tmp_path / "stopped-dflash"
    train_step = train.train_step

    def stopped_step(run):
        if run.step == step:
            os.kill(os.getpid(), number)
        return train_step(run)

    monkeypatch.setattr(sys, "argv", ["train.py", "a \x1b.py", "--resume"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stopped_step)
        ending = contextlib.nullcontext()
        if step == 3:
            hint = r"stopped at step 4, .* to .*step-000004. To resume: .*'a \\x1b.py' --resume$"
            ending = pytest.raises(SystemExit, match=hint)
        with ending:
            train_into(folder, config)
    assert_same(train_into(folder, config, resume=True), expected)


HANGS = """
import ctypes, os, signal, sys, time
from training import interruption
interruption.PATIENCE_S = 1.0
with interruption.stop_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.1)
    # like NCCL: a call that Python cannot interrupt. The mutex is locked twice and never unlocked.
    mutex = ctypes.create_string_buffer(128)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if sys.argv[1] == "hangs":
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
time.sleep(1.5)
"""


@pytest.mark.parametrize("what, is_under_torchrun, status", (
    ("hangs", True, 1), ("ends", True, 0), ("ends", False, 0)))
def test_a_process_that_hangs_ends_with_one_line(what, is_under_torchrun, status):
    """A process waits in NCCL for a dead one until torchrun kills it silently, or it is killed
    although its step ended in time."""
    environment = os.environ | {"RANK": "1"}
    environment.pop("TORCHELASTIC_RUN_ID", None)
    if is_under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "any"
    process = subprocess.run(
        [sys.executable, "-c", HANGS, what], cwd=ROOT, env=environment, capture_output=True,
        text=True, timeout=120)
    assert process.returncode == status
    message = ""
    if status:
        message = "error: process 1 got SIGTERM, but its step did not finish.*--resume\n"
    assert re.fullmatch(message, process.stderr)


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
    other = changed(config, **{key: value})
    if key in MAY_CHANGE:
        checkpoints.check_same_run("a-dflash", before, other)
        return
    with pytest.raises(ValueError, match=f"settings changed: {key}.* was .*, now "):
        checkpoints.check_same_run("a-dflash", before, other)


def test_resume_after_kill_9(small_run, tmp_path):
    """A run does not resume after a real kill -9 at a random moment. For more of them:
    KILLS=20 python test_all.py kill_9"""
    config, _ = small_run
    config.epochs = 4.0
    config.save_every = 1
    config.eval_every = 9
    expected = train_into(tmp_path / "whole-dflash", config)
    config_file = write_config(tmp_path / "small.py", config, skip=("out_dir", "resume"))
    r = random.Random(0)
    for kill in range(int(os.environ.get("KILLS", 1))):
        folder = tmp_path / f"{kill}-dflash"
        command = [sys.executable, "train.py", str(config_file), f"--out_dir={folder}"]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        while process.poll() is None and not folder.exists():
            time.sleep(0.01)
        time.sleep(3 * r.random())
        process.kill()
        process.wait()
        has_checkpoint = newest_checkpoint(str(folder)) != str(folder)
        assert_same(train_into(folder, config, resume=has_checkpoint), expected)

# ------------------------------------------------------------------------------------------------
# runs of several processes


RANKS = """
import os, shutil, signal, sys
import train
from configurator import configure
from training import parallel

config_file, folder = sys.argv[1:]

def go(name, *flags):
    config = configure(vars(train), [config_file, f"--out_dir={folder}/{name}-dflash", *flags])
    run, held_out, _ = train.setup(config)
    train.loop(run, held_out)

parallel.join_processes("cpu")
go("ddp")
go("fsdp", "--parallel=fsdp")
go("muon", "--parallel=fsdp", "--optimizer=muon")
if parallel.rank() == 0:
    shutil.copytree(f"{folder}/ddp-dflash/step-000005", f"{folder}/again-dflash/step-000005")
parallel.wait_for_all()
go("again", "--parallel=ddp", "--resume")
if parallel.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
parallel.wait_for_all()
print("not reached")
"""


def test_ranks_are_the_same_run(small_run, tmp_path):
    """Failures 12 and 13: two processes with DDP or FSDP differ from one process with twice the
    grad_accum_steps; their checkpoints do not resume on one process, or not bitwise on two; a dead
    process leaves the other one waiting."""
    config, _ = small_run
    config.epochs = 2.0
    config.save_every = 5
    config.eval_every = 5
    config.grad_clip = 0.5
    (tmp_path / "ranks.py").write_text(RANKS)
    of_two = changed(config, grad_accum_steps=1)
    config_file = write_config(tmp_path / "small.py", of_two, skip=("out_dir",))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(tmp_path / "ranks.py"), str(config_file), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "SIGKILL" in done.stderr, done.stderr[-3000:]
    assert "not reached" not in done.stdout

    one = train_into(tmp_path / "one-dflash", config)
    one_muon = train_into(tmp_path / "one_muon-dflash", changed(config, optimizer="muon"))

    # The losses of all steps, and the acceptance. Muon's matmuls are in bfloat16, and shards are
    # summed in a different order, so a step differs by 3 percent.
    for name, whole, rel in (
            ("ddp", one, 1e-6), ("fsdp", one, 1e-6), ("muon", one_muon, 1e-2)):
        expected = training_entries(whole.log)
        log = training_entries(read_jsonl(tmp_path / f"{name}-dflash" / "log.jsonl"))
        assert len(log) == len(expected)
        for entry, same in zip(log, expected):
            step = (name, entry["step"])
            assert entry["loss"] == pytest.approx(same["loss"], rel=rel), step
            if rel == 1e-6:
                assert entry["accepted_up_to_slot"] == same["accepted_up_to_slot"], step

    # two processes, resumed
    ddp = tmp_path / "ddp-dflash" / "step-000010"
    again = tmp_path / "again-dflash" / "step-000010"
    for part in ("master_weights", "optimizer_state_dict"):
        leaves = tree_leaves(checkpoints.read_state_file(ddp)[part])
        same_leaves = tree_leaves(checkpoints.read_state_file(again)[part])
        for a, b in zip(leaves, same_leaves, strict=True):
            assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b, part

    # two sharded processes, then one
    fsdp = tmp_path / "fsdp-dflash" / "step-000010"
    assert sorted(os.listdir(fsdp)) == sorted(os.listdir(tmp_path / "one-dflash" / "step-000010"))
    assert load_drafter(str(fsdp), nano()[0].config)
    back = tmp_path / "back-dflash"
    shutil.copytree(tmp_path / "fsdp-dflash" / "step-000005", back / "step-000005")
    resumed = train_into(back, config, resume=True)
    for name, weight in one.weights.items():
        assert apart(resumed.weights[name], weight) < 1e-4, name
    with pytest.raises(ValueError, match="grad_accum_steps x processes was 2, now 1"):
        train_into(back, of_two, resume=True)

# ------------------------------------------------------------------------------------------------
# where a run begins and ends


@pytest.fixture
def specforge(small_run, tmp_path):
    """(config, outcome of our run, folder, its state): our checkpoint of step 3 in the layout of
    SpecForge, which has no float32 weights and counts micro-batches."""
    config, _ = small_run
    ours = train_into(tmp_path / "ours-dflash", config)
    folder = tmp_path / "theirs-dflash"
    shutil.copytree(tmp_path / "ours-dflash" / "step-000003", folder)
    state = {
        "epoch": 0,
        "global_step": 6,
        "args": argparse.Namespace(learning_rate=1e-2, output_dir="x"),
        "optimizer_state_dict": checkpoints.read_state_file(folder)["optimizer_state_dict"],
        "scheduler_state_dict": {"last_epoch": 2}}
    torch.save(state, folder / "training_state.pt")
    config = changed(config, resume_from=str(folder), out_dir=str(tmp_path / "x-dflash"))
    return config, ours, folder, state


def test_specforge_checkpoints_are_resumed(specforge, tmp_path):
    """Moments belong to different parameters, or micro-batches count as steps."""
    config, ours, _, _ = specforge
    state = checkpoints.read_state_file(tmp_path / "ours-dflash" / "step-000003")
    run, held_out, _ = train.setup(config)
    assert run.step == 3
    moments = run.optimizer.state_dict()["state"]
    for i, (name, weight) in enumerate(run.drafter.named_parameters()):
        master = state["master_weights"][name]
        assert torch.equal(weight, master.bfloat16().float()), name
        assert moments[i]["exp_avg"].shape == weight.shape, name
    train.loop(run, held_out)
    # the same run, except for weights that were rounded to bfloat16
    weights = run.drafter.state_dict()
    assert 0 < max(apart(weights[name], ours.weights[name]) for name in weights) < 0.02


def test_specforge_checkpoints_that_do_not_fit_are_refused(specforge):
    """Moments of different parameters or of AdamW are used."""
    config, ours, folder, state = specforge
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
    train.setup(config)
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
    config.decode_prompts = 9  # of six samples
    config.dtype = "bfloat16"
    monkeypatch.setattr(train, "DECODE_TOKENS", 12)
    monkeypatch.setattr(train, "DECODE_SLOTS", 1)
    tokens, supervised = rows[0]
    two_answers = np.array([0, 0, 0, 1, 1, 0, 0, 1])
    rows = [(tokens, supervised), (np.arange(8), two_answers)]
    expected_prompts = [tokens[supervised == 0].tolist(), [0, 1, 2]]
    longest = 1024 - K - 1
    for length in (0, longest + 1, longest):
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
