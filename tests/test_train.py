"""
Training: batches, one step, and runs that are interrupted, killed, resumed or shared by processes.
"""
import argparse
import errno
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
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from training import flops
import train
from training import log as training_log
from training import checkpoints as training_state
from checkpoint import load_drafter, newest_checkpoint
from configurator import configure
from fast.cpu import attention_by_anchor_groups
from draft_decode import RoundOutput
from training.flops import training_operations
from loss import block_labels, block_loss, chunk_loss, sample_anchors
from target import Target
from tests.common import (K, NANO_DRAFTER, NANO_TARGET, ROOT, V, apart, nano, nano_copy, phase_1_2,
                          read_jsonl, small_drafter, small_target, tokens_of, write_config)

# ------------------------------------------------------------------------------------------------
# whole runs: small ones, on the nano target


class Outcome(NamedTuple):
    """What a run leaves: weights, moments of the optimizer, and its log without measured speed."""
    weights: dict
    moments: dict
    log: list


def changed(config, **values):
    """A copy of a configuration with other values."""
    return SimpleNamespace(**vars(config) | values)


def train_into(folder, config, resume=False, draws=False):
    """Train until the end, or until something stops it; checkpoints and log stay in the folder.
    draws: whether training.png is drawn, which takes as long as two steps; else it is empty."""
    run, held_out, _ = train.setup(changed(config, out_dir=str(folder), resume=resume))
    with pytest.MonkeyPatch.context() as patch:
        if not draws:
            patch.setattr(Figure, "savefig", save_nothing)
        train.loop(run, held_out)
    log = read_jsonl(folder / "log.jsonl")
    for entry in log:
        entry.pop("tokens_per_s", None)
        entry.pop("minutes_left", None)
    return Outcome(run.drafter.state_dict(), run.optimizer.state_dict()["state"], log)


def save_nothing(figure, path, **options):
    """In place of Figure.savefig: an empty file."""
    Path(path).touch()


def assert_same(a, b):
    """Two outcomes are equal to the bit."""
    assert a.log == b.log
    assert a.weights.keys() == b.weights.keys()
    for name, weight in a.weights.items():
        assert torch.equal(weight, b.weights[name]), name
    assert a.moments.keys() == b.moments.keys()
    assert len(a.moments) == len(a.weights)
    for i, moments in a.moments.items():
        for name, moment in moments.items():
            assert torch.equal(moment, b.moments[i][name]), (i, name)


def read_state(folder):
    return torch.load(folder / "training_state.pt", weights_only=False)


def training_entries(log):
    return [entry for entry in log if entry["kind"] == "train"]

# ------------------------------------------------------------------------------------------------
# batches


def test_batches_are_a_function_of_seed_and_number(small_run):
    """Failures 12 and 14: batches that depend on the order of calls, repeat or miss rows, or have
    any length."""
    config, rows = small_run
    batches = train.MicroBatches(rows, config)
    in_order = [batches[n] for n in range(20)]
    for n in (13, 2, 19, 2):
        tokens, supervised = train.MicroBatches(rows, config)[n]
        assert torch.equal(tokens, in_order[n][0])
        assert torch.equal(supervised, in_order[n][1])
    for tokens, supervised in in_order:
        assert tokens.shape == supervised.shape == (2, 64)

    epochs = []
    for first in (0, 10):
        numbers = [batches.sample_numbers(n) for n in range(first, first + 10)]
        epochs.append(np.concatenate(numbers).tolist())
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(20))
    assert epochs[0] != epochs[1]
    other = train.MicroBatches(rows, changed(config, seed=1))
    assert other.sample_numbers(0).tolist() != batches.sample_numbers(0).tolist()

    for n in range(10):
        tokens, _ = batches[n]
        for i, number in enumerate(batches.sample_numbers(n)):
            row_tokens, _ = rows[number]
            assert tokens[i, :len(row_tokens)].tolist() == row_tokens.tolist()


@pytest.mark.parametrize("max_length", (20, 59, 128))
def test_batches_are_cut_and_padded(small_run, max_length):
    """Failure 14: rows longer than max_length are not cut, or padding is supervised."""
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


def test_batches_of_one_row_length_have_one_shape(small_run):
    """Failure 14: a row of exactly a multiple of pad_to_multiple_of gets another one of padding."""
    config, _ = small_run
    for length, padded in ((1, 64), (63, 64), (64, 64), (65, 128), (128, 128), (999, 128)):
        row = np.ones(length, np.int64)
        tokens, _ = train.pad([(row, row)], config)
        assert tokens.shape == (1, padded), length


def test_batches_hold_rows_alike_in_length(small_run):
    """Half of a batch is padding; or rows come short ones first, in an order that is the same in
    every epoch."""
    config, _ = small_run
    config.batch_size = 4
    config.max_length = 3072
    r = np.random.default_rng(0)
    lengths = (r.gamma(2.0, 600, 2003) + 50).astype(int).clip(max=3072)
    rows = [(np.zeros(length), np.ones(length)) for length in lengths]
    batches = train.MicroBatches(rows, config)
    assert batches.per_epoch() == 500
    longest = [lengths[batches.sample_numbers(n)].max() for n in range(1000)]
    first_epoch = longest[:500]
    padded = sum(math.ceil(length / 64) * 64 * 4 for length in first_epoch)
    assert padded < 1.1 * lengths.sum()
    order = np.corrcoef(first_epoch, range(500))[0, 1]
    assert abs(order) < 0.15
    assert first_epoch != longest[500:]



class Unshuffled:
    """A generator whose permutations change nothing."""

    def permutation(self, x):
        return np.arange(x) if isinstance(x, int) else x


@pytest.mark.parametrize("bucket_size, expected", (
    (1, [[1, 0], [3, 2], [5, 4], [7, 6]]),
    (2, [[1, 3], [0, 2], [5, 7], [6, 4]]),
    (64, [[1, 3], [5, 0], [7, 6], [2, 4]]),
))
def test_batches_are_sorted_within_their_window(small_run, monkeypatch, bucket_size, expected):
    """bucket_size that does not arrive, or counts samples instead of micro-batches of two."""
    config, _ = small_run
    config.bucket_size = bucket_size
    lengths = (4, 1, 8, 2, 9, 3, 7, 6)
    rows = [(np.zeros(length), np.ones(length)) for length in lengths]
    monkeypatch.setattr(np.random, "default_rng", lambda seed: Unshuffled())
    assert train.MicroBatches(rows, config).shuffled(0).tolist() == expected

# ------------------------------------------------------------------------------------------------
# one step


class KeepsGradients(torch.optim.SGD):
    """Changes nothing; a step keeps the gradient, in one vector, in `gradient`."""
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
    """Failure 13: a mean of means. The same rows as 1 x 8 and 4 x 2 give one loss and one
    gradient."""
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
    # else a mean of means would pass
    batches = train.MicroBatches(rows, split_config)
    counts = {int(batches[n][1].sum()) for n in range(4)}
    assert len(counts) > 1


def test_step_divides_gradients_before_it_clips_them(small_run):
    """A gradient that is clipped as a sum and then divided by the weights: next to nothing is
    left of it."""
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
    """What micro_batch_loss draws and computes: its anchors, and the hidden states of their blocks;
    and all anchors that were drawn in the test."""
    seen = {"all_anchors": []}

    def keep_anchors(*args):
        seen["anchors"], seen["real"] = sample_anchors(*args)
        seen["all_anchors"].append(seen["anchors"].tolist())
        return seen["anchors"], seen["real"]

    def keep_hidden(hidden, *args, **options):
        seen["hidden"] = hidden
        return block_loss(hidden, *args, **options)

    monkeypatch.setattr(train, "sample_anchors", keep_anchors)
    monkeypatch.setattr(train, "block_loss", keep_hidden)
    return seen


def test_leak_from_future_tokens_through_the_whole(small_run, seen):
    """Failure 1: tokens after the anchor reach its guesses, through the target's features or the
    block's ids; or the token before it and its own do not."""
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
    """Failure 1: features are shifted by one between the target and the drafter, so that a block
    also reads that of its anchor, which was computed to predict what the block shall guess."""
    config, rows = small_run
    run = small_training_run(config, rows)
    handed_on = []

    def keep(features, embedded, anchors, attend):
        handed_on.append(features)
        return run.drafter(features, embedded, anchors, attend)

    tokens, supervised = run.micro_batches[0]
    train.micro_batch_loss(run, tokens, supervised, torch.Generator(), keep)
    features, _ = run.target(tokens, target_layer_ids=run.drafter.target_layer_ids)
    assert torch.equal(handed_on[0], features)


@pytest.mark.parametrize("weighting", ("decay", "dpace"))
def test_step_has_the_loss_of_its_keys(small_run, seen, weighting):
    """decay and dpace exchanged; gamma or dpace_smoothing that does not arrive."""
    config, rows = small_run
    config.weighting = weighting
    config.gamma = 3.0
    config.dpace_smoothing = 0.25
    run = small_training_run(config, rows)
    tokens, supervised = run.micro_batches[0]
    loss, sums = train.micro_batch_loss(run, tokens, supervised, torch.Generator())

    labels, weights = block_labels(tokens, supervised, seen["anchors"], seen["real"], K, gamma=3.0)
    form = None
    if weighting == "dpace":
        form = functools.partial(chunk_loss, dpace_smoothing=0.25)
    expected, _, _, used = block_loss(
        seen["hidden"], run.target.head_weight, labels, weights, chunk_loss_function=form)
    assert torch.equal(loss, expected)
    assert sums.loss == loss.item()
    assert sums.weight.item() == pytest.approx(used.sum().item())
    assert sums.blocks == seen["real"].sum()
    assert sums.tokens == tokens.numel()


STEP_KEYS = (  # a key of train.py, a value, and what acts on it must be given
    ("num_anchors", 5, {"count": 5}),
    ("max_length", 77, {"max_length": 77}),
    ("loss_chunk_size", 45, {"loss_chunk_size": 45}),
    ("attention", "flex", {"attend": None}),
    ("attention", "grouped", {"attend": attention_by_anchor_groups}),
    ("compile", True, {"chunk_loss": "compiled"}),
    ("compile", False, {"chunk_loss": "plain"}),
    ("dtype", "bfloat16", {"products": torch.bfloat16, "parameters": torch.float32}),
    ("dtype", "float32", {"products": torch.float32, "parameters": torch.float32}),
)


@pytest.mark.parametrize("key, value, expected", STEP_KEYS)
def test_step_hands_its_keys_on(small_run, monkeypatch, key, value, expected):
    """A key that does not arrive where it acts: a step without it is no error. It is only slower,
    takes more memory, has other anchors, or bf16's products in place of fp32's."""
    config, rows = small_run
    run = small_training_run(config, rows)
    run.config = changed(config, **{key: value})
    given = {"parameters": run.drafter.fc.weight.dtype}
    forward = run.drafter.forward

    def keep_anchors(supervised, count, generator, max_length):
        given.update(count=count, max_length=max_length)
        return sample_anchors(supervised, count, generator, max_length)

    def keep_attention(features, embedded, anchors, attend):
        # flex_attention has no backward here
        hidden = forward(features, embedded, anchors, attention_by_anchor_groups)
        given.update(attend=attend, products=run.drafter.fc(features).dtype)
        return hidden

    def keep_loss(hidden, head, labels, weights, loss_chunk_size, chunk_loss):
        given.update(loss_chunk_size=loss_chunk_size, chunk_loss=chunk_loss)
        return block_loss(hidden, head, labels, weights)

    monkeypatch.setattr(train, "sample_anchors", keep_anchors)
    monkeypatch.setattr(train, "block_loss", keep_loss)
    monkeypatch.setattr(train, "chunk_loss", "plain")
    monkeypatch.setattr(train, "compiled_chunk_loss", "compiled")
    run.wrapped_drafter = keep_attention
    train.train_step(run)
    assert expected.items() <= given.items()


def test_step_counts_acceptance_up_to_the_end_of_a_response(small_run, monkeypatch):
    """tau without the target's own token, or with guesses past the response. Here all guesses are
    right, and responses are of 3 and 9 tokens: 2 + 8 anchors that reach 1 .. 2 and 1 .. 8 slots."""
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
    assert sums.blocks == 10
    assert sums.reached.tolist() == [10, 8, 6, 5, 4, 3, 2, 1] + [0] * 7
    assert sums.right_up_to.tolist() == sums.reached.tolist()
    tau, accepted_up_to_slot = train.acceptance(sums)
    assert tau == pytest.approx(1 + 39 / 10)
    assert accepted_up_to_slot == [1.0] * 8 + [0.0] * 7


def test_step_draws_anchors_by_seed_and_batch(small_run, seen):
    """Failure 12: the run's seed, or the number of the micro-batch, is left out of its anchors."""
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


def test_run_begins_with_the_keys_of_its_config(small_run):
    """betas, weight_decay or lr never given to AdamW; steps other than the epochs ask for."""
    config, rows = small_run
    config.betas = (0.8, 0.95)
    config.weight_decay = 0.03
    drafter = small_drafter()
    run = train.new_run(config, small_target(), drafter, rows)
    assert type(run.optimizer) is torch.optim.AdamW
    group, = run.optimizer.param_groups
    assert group["betas"] == (0.8, 0.95)
    assert group["weight_decay"] == 0.03
    assert group["lr"] == config.lr
    assert run.total_steps == 6  # 1.2 epochs of 10 micro-batches, 2 a step


def test_drafter_begins_with_the_keys_of_its_config(small_run):
    """A width, a layer or the mask of the configuration that does not arrive in the drafter;
    weights that do not follow the seed."""
    config, _ = small_run
    config.num_layers = 2
    config.block_size = 8
    config.mask_token_id = 510
    run, _, stops = train.setup(config)
    drafter = run.drafter
    assert len(drafter.layers) == 2
    assert drafter.block_size == 8
    assert drafter.mask_token_id == 510
    assert drafter.target_layer_ids == (1, 3)
    layer = drafter.layers[0]
    assert layer.self_attn.q_proj.weight.shape == (4 * 32, 128)
    assert layer.self_attn.k_proj.weight.shape == (2 * 32, 128)
    assert layer.mlp.up_proj.weight.shape == (64, 128)
    assert stops == {502, 504}

    config.mask_token_id = None  # the first id after the tokenizer's
    same, _, _ = train.setup(config)
    other, _, _ = train.setup(changed(config, seed=1))
    assert same.drafter.mask_token_id == 507
    assert torch.equal(same.drafter.fc.weight, drafter.fc.weight)
    assert not torch.equal(other.drafter.fc.weight, drafter.fc.weight)


def test_setup_reads_what_its_keys_name(small_run, monkeypatch):
    """Held-out samples that are those of the training; a target in another dtype than its key's, a
    drafter that is trained in bf16; layers that are compiled unasked, or not at all."""
    config, rows = small_run
    compiled = []
    monkeypatch.setattr(train, "compile_layers", lambda *models: compiled.append(models))
    run, held_out, _ = train.setup(changed(config, dtype="bfloat16"))
    assert len(run.micro_batches.samples) == len(rows) == 20
    assert len(held_out) == 3
    assert run.target.embed_tokens.weight.dtype == torch.bfloat16
    assert {parameter.dtype for parameter in run.drafter.parameters()} == {torch.float32}
    assert not compiled
    run, _, _ = train.setup(changed(config, compile=True))
    assert compiled == [(run.target, run.drafter)]


def test_warm_up_meets_every_length(small_run, monkeypatch):
    """A length of samples that is compiled in the midst of a run, as nothing compiled it before;
    or recorded as a graph there, as it went through only once."""
    config, rows = small_run
    config.max_length = 200  # padded to 256
    run = small_training_run(config, rows)
    shapes = []

    def keep_shape(run, tokens, supervised, generator, trained_module):
        shapes.append(tuple(tokens.shape))
        assert supervised.all()
        return torch.zeros((), requires_grad=True), None

    monkeypatch.setattr(train, "micro_batch_loss", keep_shape)
    train.warm_up(run)
    assert shapes == [(2, 256)] * 2 + [(2, 192)] * 2 + [(2, 128)] * 2 + [(2, 64)] * 2


def test_every_length_may_be_compiled(small_run, monkeypatch):
    """A run without --compile whose flex_attention is not compiled for the ninth length of samples,
    and forms all scores there."""
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    small_training_run(*small_run)
    nano_lengths = 256 // 16
    assert torch._dynamo.config.recompile_limit >= nano_lengths


def test_rate_warms_up_and_ends_at_zero(small_run):
    """A schedule that starts at zero (a lost step), never reaches its peak or ends above zero."""
    config, _ = small_run
    config.lr = 2.0
    config.warmup = 0.1
    rates = [train.learning_rate(step, 100, config) for step in range(101)]
    assert rates[0] == 0.2
    assert rates[9] == rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] < 1e-9
    assert rates[:10] == sorted(rates[:10])
    assert rates[10:] == sorted(rates[10:], reverse=True)


def test_steps_have_the_rate_of_the_schedule(small_run):
    """A schedule that is logged and never given to the optimizer; gradients that are left over for
    the next step; a step more or less than is counted."""
    config, rows = small_run
    config.num_anchors = 4
    drafter = small_drafter().requires_grad_()
    rows = [(tokens % V, supervised) for tokens, supervised in rows]
    run = train.new_run(config, small_target(), drafter, rows)
    for step in range(run.total_steps):
        assert run.step == step
        entry, _ = train.train_step(run)
        rate = train.learning_rate(step, run.total_steps, config)
        assert entry["lr"] == rate
        assert [group["lr"] for group in run.optimizer.param_groups] == [rate]
        assert all(parameter.grad is None for parameter in drafter.parameters())
    rates = [train.learning_rate(step, run.total_steps, config) for step in range(run.total_steps)]
    assert len(set(rates)) > 3


def test_mask_is_the_first_free_id():
    """A mask that is a token of the text, or one behind the last row of the embedding."""
    config = SimpleNamespace(mask_token_id=None)
    assert train.mask_id(config, range(507), 512) == 507  # of a tokenizer only the length counts
    assert train.mask_id(config, range(511), 512) == 511
    assert train.mask_id(config, None, 512) == 511
    for value, is_inside in ((0, True), (511, True), (512, False), (-1, False)):
        config.mask_token_id = value
        if is_inside:
            assert train.mask_id(config, range(507), 512) == value
            continue
        with pytest.raises(ValueError, match=f"mask_token_id = {value} is outside"):
            train.mask_id(config, range(507), 512)


def test_card_says_what_was_trained(small_run):
    """A card in a published checkpoint that names another target, step, width or data."""
    config, _ = small_run
    config.target = "Qwen/Qwen3.5-0.8B/"
    config.data = "data/math240k"
    config.num_layers = 5
    config.block_size = 8
    card = training_state.model_card(SimpleNamespace(config=config, step=30, total_steps=400))
    assert card.startswith("# DFlash drafter for Qwen3.5-0.8B\n")
    assert "5 layers, blocks of 8, features of target layers [1, 3]." in card
    assert card.endswith("Step 30 of 400; data: math240k.\n")


def test_estimate_is_the_same_every_time(small_run):
    """Anchors of the estimate that are drawn anew, so that its noise looks like learning; a row
    more or less than eval_samples; a mean of means."""
    config, rows = small_run
    config.num_anchors = 4
    config.eval_samples = 5  # two batches of two
    run = small_training_run(config, rows)
    estimate = train.estimate(run, run.micro_batches.samples)
    torch.manual_seed(7)
    assert train.estimate(run, run.micro_batches.samples) == estimate
    assert train.estimate(run, run.micro_batches.samples[:4]) == estimate
    assert train.estimate(run, run.micro_batches.samples[2:]) != estimate
    # samples that fill no batch count where there are no others
    assert train.estimate(run, run.micro_batches.samples[:1])["loss"] > 0

    loss = 0
    weight = 0
    for first in (0, 2):
        tokens, supervised = train.pad(run.micro_batches.samples[first:first + 2], config)
        generator = torch.Generator().manual_seed(first)
        _, sums = train.micro_batch_loss(run, tokens, supervised, generator)
        loss += sums.loss.item()
        weight += sums.weight.item()
    assert estimate["loss"] == pytest.approx(loss / weight)


def test_operations_are_those_of_phase_1_2():
    """An MFU that counts other operations than are made: per sample 4.2 TFLOP for the drafter, 1.5
    for its attention, 7.8 for the head, 2.6 for the target's layers up to the last feature."""
    with torch.device("meta"):
        config, drafter = phase_1_2()
        target = Target(config)
    alone = training_operations(drafter, 1, 3072, 512)
    both = training_operations(drafter, 1, 3072, 512, target)
    assert alone == pytest.approx(13.53e12, rel=1e-3)
    assert both - alone == pytest.approx(2.55e12, rel=1e-3)


MFU = (  # the name of a GPU, and operations a second of which a quarter is asked for
    ("NVIDIA H100 80GB HBM3", 989e12),
    ("NVIDIA H100 PCIe", 756e12),
    ("NVIDIA H200", 989e12),
    ("NVIDIA A100-SXM4-80GB", 312e12),
)


@pytest.mark.parametrize("gpu, peak", MFU)
def test_operations_as_a_share_of_the_peak(monkeypatch, gpu, peak):
    """A share of another GPU's peak, of one GPU's where there are two, or of bf16's in fp32."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: gpu)
    assert flops.mfu(peak / 4, "cuda", "bfloat16") == 0.25
    assert flops.mfu(peak / 4, "cuda", "float32") is None
    assert flops.mfu(peak / 4, "cpu", "bfloat16") is None
    monkeypatch.setattr(flops, "world_size", lambda: 2)
    assert flops.mfu(peak / 2, "cuda", "bfloat16") == 0.25
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "another")
    assert flops.mfu(peak, "cuda", "bfloat16") is None

# ------------------------------------------------------------------------------------------------
# what a run says of itself


class Wandb:
    """Stands for the package wandb, and keeps what it is given."""

    def __init__(self):
        self.project = None
        self.logged = []

    def init(self, project, name, config):
        self.project = project
        assert config["wandb_project"] == project

    def log(self, numbers, step):
        self.logged.append((step, numbers))


@pytest.fixture
def wandb(monkeypatch):
    wandb = Wandb()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_log_by_hand(small_run, monkeypatch, capsys, wandb):
    """Failure 15: a speed or a time left that counts steps from before a resume, shares of the slot
    before or after the one that is named, or another process' memory.

    Steps 10 and 11 of 15 in 50 s: 2,000 tokens are 40 tokens/s, and 4 steps are left, 100 s."""
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
    entry = {"lr": 3e-4, "loss": 1.25, "grad_norm": 0.5, "tau": 4.0, "skipped": 2,
             "accepted_up_to_slot": [0.5] * 15}
    log.training(run, entry)
    shares = [slot / 100 for slot in range(1, 16)]
    log.held_out(run, {"loss": 2.5, "tau": 3.0, "accepted_up_to_slot": shares})
    log.close()

    lines = capsys.readouterr().out.splitlines()
    assert lines == [
        "step 11/15 | loss 1.2500 | tau 4.00 | norm 0.50 | lr 3.0e-04 | 40 tokens/s | "
        "25.0% MFU | 3.5 GB | 2 skipped | 1.7 min left",
        "step 11/15 | held out: loss 2.5000 | tau 3.00 | accepted up to slot "
        "1:0.01 2:0.02 4:0.04 8:0.08 15:0.15"]
    training, held_out = read_jsonl(Path(config.out_dir) / "log.jsonl")
    expected = {"kind": "train", "step": 11, "tokens_per_s": 40.0, "mfu": 0.25,
                "minutes_left": pytest.approx(100 / 60), "peak_gb": [1.0, 3.5]}
    assert training == entry | expected
    assert held_out["kind"] == "val"
    assert held_out["accepted_up_to_slot"] == shares
    (step, numbers), (_, held_out_numbers) = wandb.logged
    assert step == 11
    assert numbers["train/loss"] == 1.25
    assert held_out_numbers == {"val/loss": 2.5, "val/tau": 3.0}


def test_log_and_checkpoints_keep_their_rhythm(small_run, tmp_path):
    """log_every, eval_every and save_every exchanged, or a last step that is not logged."""
    config, _ = small_run
    config.log_every = 4
    config.eval_every = 5
    config.save_every = 2
    config.keep_checkpoints = 2
    config.num_anchors = 4
    outcome = train_into(tmp_path / "a-dflash", config)
    entries = [(entry["kind"], entry["step"]) for entry in outcome.log]
    assert entries == [("train", 4), ("val", 5), ("train", 6), ("val", 6)]
    folders = sorted(path.name for path in (tmp_path / "a-dflash").glob("step-*"))
    assert folders == ["step-000004", "step-000006"]


def test_train_hands_on_and_prints(small_run, monkeypatch, capsys, wandb):
    """The last lines of a run: a folder, a count or a tau of something else; stop ids, the project
    or the held-out samples that do not arrive; nothing compiled before the first step."""
    config, _ = small_run
    config.wandb_project = "project"
    config.compile = True
    done = []

    def keep_loop(run, held_out):
        done.append(len(held_out))
        return "F"

    def keep_decoding(config, folder, samples, stops):
        done.append(("decoded", folder, len(samples), stops))
        return 2.5

    monkeypatch.setattr(train, "compile_layers", lambda *models: None)
    monkeypatch.setattr(train, "warm_up", lambda run: done.append("compiled"))
    monkeypatch.setattr(train, "loop", keep_loop)
    monkeypatch.setattr(train, "decode_held_out", keep_decoding)
    train.train(config)
    assert done == ["compiled", 3, ("decoded", "F", 3, {502, 504})]
    assert wandb.project == "project"
    first, *last = capsys.readouterr().out.splitlines()
    # one layer: attention 128 x (128 + 64 + 64 + 128), its two norms of 32, the MLP 3 x 128 x 64,
    # norms 2 x 128; and fc 256 x 128, two norms of 128
    drafter_size = 49_152 + 64 + 24_576 + 256 + 32_768 + 256
    assert first.startswith(f"{drafter_size:,} parameters to train for a target of 2,9")
    assert first.endswith(" | 20 samples, 6 steps on 1 x cpu")
    assert last == [
        f"wrote F and {config.out_dir}/training.png",
        f"try it: python draft_decode.py --target={NANO_TARGET} --drafter=F --prompt \"...\"",
        "held-out tau from real decoding: 2.500 (3 prompts)"]

    config.decode_prompts = 2
    config.compile = False
    config.wandb_project = None
    done.clear()
    train.train(config)
    assert "compiled" not in done
    assert capsys.readouterr().out.endswith("2.500 (2 prompts)\n")

# ------------------------------------------------------------------------------------------------
# steps that are skipped


def factors_by_step(factors, micro_batch_loss):
    """micro_batch_loss with the loss of some steps, counted from 0, multiplied by a factor."""
    def faulty(run, *args, **options):
        loss, sums = micro_batch_loss(run, *args, **options)
        return loss * factors.get(run.step, 1), sums
    return faulty


def test_strange_gradients_are_skipped_and_counted(small_run, monkeypatch, tmp_path):
    """One NaN in a run of days that ruins weights and moments; or a spike, long after the others
    were small, that undoes the work of hours."""
    config, _ = small_run
    config.eval_every = 99
    faulty = factors_by_step({2: math.nan, 4: 1e4}, train.micro_batch_loss)
    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    weights = []
    step = train.train_step

    def step_and_keep(run):
        result = step(run)
        weights.append(next(run.drafter.parameters()).detach().clone())
        return result

    monkeypatch.setattr(train, "train_step", step_and_keep)
    outcome = train_into(tmp_path / "a-dflash", config)
    skipped = [entry["skipped"] for entry in training_entries(outcome.log)]
    assert skipped == [0, 0, 1, 1, 2, 2]
    moved = [not torch.equal(a, b) for a, b in itertools.pairwise(weights)]
    assert moved == [True, False, True, False, True]
    assert weights[-1].isfinite().all()
    state = read_state(tmp_path / "a-dflash" / "step-000006")
    assert state["gradient_guard"]["skipped"] == 2
    assert state["gradient_guard"]["skipped_in_a_row"] == 0
    assert state["optimizer_state_dict"]["state"][0]["step"] == 4


def test_usual_gradients_are_a_moving_average(small_run):
    """A single large gradient that makes the next spikes usual; one at the limit that is skipped;
    one that is skipped but counted as usual."""
    config, rows = small_run
    run = small_training_run(config, rows)
    run.step = 5  # after warm-up
    def step(grad_norm):
        is_skipped = train.is_unusual(grad_norm, run)
        run.guard.record(grad_norm, is_skipped)
        return is_skipped

    assert not step(2.0)
    assert run.guard.usual_norm == 2.0
    assert not step(20.0)
    assert run.guard.usual_norm == pytest.approx(2.36)
    assert step(23.7)
    assert step(math.inf)
    assert run.guard.usual_norm == pytest.approx(2.36)
    assert run.guard.skipped == run.guard.skipped_in_a_row == 2
    assert not step(23.5)
    assert run.guard.skipped == 2
    assert run.guard.skipped_in_a_row == 0
    config.spike_factor = 3.0
    assert step(8.4)    # usual is 2.78
    assert not step(8.2)


def test_strange_gradients_end_the_run(small_run, monkeypatch, tmp_path):
    """A run that goes on for hours with nothing but NaN."""
    config, rows = small_run
    config.max_consecutive_skips = 2
    config.eval_every = 99
    faulty = factors_by_step({0: math.nan, 1: math.nan}, train.micro_batch_loss)
    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    batches = train.MicroBatches(rows, config)
    looked_at = batches.sample_numbers(2).tolist() + batches.sample_numbers(3).tolist()
    hint = rf"step 2 has norm nan.*skipped in a row: 2\. Look at.*{re.escape(str(looked_at))}"
    with pytest.raises(ValueError, match=hint):
        train_into(tmp_path / "b-dflash", config)


def test_strange_gradients_apart_do_not_end_the_run(small_run, monkeypatch, tmp_path):
    """Skipped steps counted as in a row although good ones lie between them; a large gradient
    skipped during warm-up, when gradients are not yet what they will be."""
    config, _ = small_run
    config.max_consecutive_skips = 2
    config.warmup = 0.5
    config.eval_every = 99
    factors = {0: math.nan, 2: 1e4, 3: math.nan, 5: math.nan}
    faulty = factors_by_step(factors, train.micro_batch_loss)
    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    outcome = train_into(tmp_path / "c-dflash", config)
    skipped = [entry["skipped"] for entry in training_entries(outcome.log)]
    assert skipped == [1, 1, 1, 2, 2, 3]

# ------------------------------------------------------------------------------------------------
# runs that are interrupted


def stops_at(step, signal_number, train_step):
    """train_step, with a signal to this process in the midst of the step after so many."""
    def stopping(run):
        if run.step == step:
            os.kill(os.getpid(), signal_number)
        return train_step(run)
    return stopping


@pytest.mark.parametrize("optimizer", ("adamw", "muon"))
def test_resume_equals_uninterrupted_run(small_run, tmp_path, optimizer):
    """Failure 12: repeated data, moments or master weights lost to bf16. All is equal bit for bit,
    the log too, after a crash, which leaves a log that runs ahead and a torn line."""
    config, _ = small_run
    config.optimizer = optimizer
    whole = tmp_path / "whole-dflash"
    expected = train_into(whole, config, draws=True)
    kinds = [(e["kind"], e["step"]) for e in expected.log if e["step"] in (3, 6)]
    assert kinds == [("train", 3), ("val", 3), ("train", 6), ("val", 6)]
    assert newest_checkpoint(str(whole)) == str(whole / "step-000006")
    assert (whole / "training.png").read_bytes()[:4] == b"\x89PNG"

    crashed = tmp_path / "crashed-dflash"
    shutil.copytree(whole / "step-000003", crashed / "step-000003")
    lines = (whole / "log.jsonl").read_text().splitlines(True)
    (crashed / "log.jsonl").write_text("".join(lines[:6]) + lines[6][:20])
    assert_same(train_into(crashed, config, resume=True), expected)


def test_resume_skips_the_same_steps(small_run, monkeypatch, tmp_path):
    """Failure 12: what is usual for a gradient, and how many steps were skipped, is forgotten."""
    config, _ = small_run
    faulty = factors_by_step({1: math.nan, 3: 1e4}, train.micro_batch_loss)
    monkeypatch.setattr(train, "micro_batch_loss", faulty)
    whole = tmp_path / "whole-dflash"
    expected = train_into(whole, config)
    resumed = tmp_path / "resumed-dflash"
    shutil.copytree(whole / "step-000003", resumed / "step-000003")
    shutil.copy(whole / "log.jsonl", resumed)
    assert_same(train_into(resumed, config, resume=True), expected)
    skipped = [entry["skipped"] for entry in training_entries(expected.log)]
    assert skipped == [0, 1, 1, 2, 2, 2]


@pytest.mark.parametrize("number", (signal.SIGTERM, signal.SIGINT))
def test_resume_after_a_signal(small_run, monkeypatch, tmp_path, number):
    """Failure 12: SIGTERM or Ctrl-C loses what was done since the last checkpoint, or leaves no
    word on how to go on; and the run that goes on is another one."""
    config, _ = small_run
    expected = train_into(tmp_path / "whole-dflash", config)
    folder = tmp_path / "stopped-dflash"
    monkeypatch.setattr(sys, "argv", ["train.py", "config/nano.py"])
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_step", stops_at(3, number, train.train_step))
        hint = r"stopped at step 4, saved .*step-000004; to go on: .*nano.py --resume$"
        with pytest.raises(SystemExit, match=hint):
            train_into(folder, config)
    assert_same(train_into(folder, config, resume=True), expected)


HANGS = """
import ctypes, os, signal, sys, threading, time
from training import interruption
interruption.PATIENCE_S = 1.0
with interruption.stop_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(float(sys.argv[1]))
    # as in NCCL: a call that Python cannot interrupt. The mutex is locked twice and never free.
    mutex = ctypes.create_string_buffer(128)
    ctypes.CDLL(None).pthread_mutex_lock(mutex)
    if sys.argv[2] == "hangs":
        ctypes.CDLL(None).pthread_mutex_lock(mutex)
time.sleep(1.5)
"""


@pytest.mark.parametrize("what, is_under_torchrun, status", (
    ("hangs", True, 1), ("ends", True, 0), ("ends", False, 0)))
def test_a_process_that_hangs_ends_with_one_line(what, is_under_torchrun, status):
    """A process that waits in NCCL for one that died, until torchrun kills it without a word; or
    one that is ended although its step came to an end in time."""
    environment = dict(os.environ, RANK="1")
    if is_under_torchrun:
        environment["TORCHELASTIC_RUN_ID"] = "any"
    command = [sys.executable, "-c", HANGS, "0.1", what]
    process = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert process.returncode == status
    lines = process.stderr.splitlines()
    assert len(lines) == status
    if status:
        assert lines[0].startswith("error: process 1 was told to end")
        assert "--resume" in lines[0]


def test_resume_refuses_another_run(small_run, tmp_path):
    """Failure 12: a run that overwrites another one, or goes on with other settings."""
    config, _ = small_run
    config.epochs = 0.4
    folder = tmp_path / "a-dflash"
    train_into(folder, config)
    with pytest.raises(ValueError, match="holds a run.*--resume"):
        train_into(folder, config)
    with pytest.raises(ValueError, match="another run.*lr was 0.01, is 1.0"):
        train_into(folder, changed(config, lr=1.0), resume=True)


# what a resumed run may change and still be the same run
MAY_CHANGE = {
    "resume", "resume_from", "out_dir",                                  # where it goes on
    "log_every", "eval_every", "eval_samples", "save_every", "keep_checkpoints", "wandb_project",
    "decode_prompts", "decode_tokens",                                  # looking at it
    "device", "attention", "compile", "parallel", "loss_chunk_size", "pad_to_multiple_of"}  # how


@pytest.mark.parametrize("key", vars(configure(vars(train), [])))
def test_resume_compares_every_key(key):
    """Failure 12: a key of another run that passes without a word; or one that is refused although
    it changes no result."""
    config = configure(vars(train), [])
    before = vars(config) | {"ranks": 1}
    value = 4 if key == "grad_accum_steps" else "another"
    other = changed(config, **{key: value})
    if key in MAY_CHANGE:
        training_state.check_same_run("a-dflash", before, other)
        return
    with pytest.raises(ValueError, match=f"another run.*{key}.* was .*, is "):
        training_state.check_same_run("a-dflash", before, other)


@pytest.mark.parametrize("grad_accum_steps, ranks, is_same", (
    (2, 1, True), (1, 2, True), (1, 1, False), (2, 2, False), (4, 1, False)))
def test_resume_compares_the_samples_of_a_step(grad_accum_steps, ranks, is_same):
    """Failure 12: steps of more or fewer samples than before. This run has 2 micro-batches a
    step."""
    config = configure(vars(train), [])
    before = vars(config) | {"grad_accum_steps": grad_accum_steps, "ranks": ranks}
    if is_same:
        training_state.check_same_run("a-dflash", before, config)
        return
    hint = f"grad_accum_steps x ranks was {grad_accum_steps * ranks}, is 2"
    with pytest.raises(ValueError, match=hint):
        training_state.check_same_run("a-dflash", before, config)


class Killed(BaseException):
    """What nothing catches, as kill -9."""


def killed_at(call, function, half_done):
    """A function that in its call of that number does half of its work and ends the process."""
    calls = itertools.count(1)

    def dying(*args, **kwargs):
        if next(calls) == call:
            half_done(*args)
            raise Killed
        return function(*args, **kwargs)
    return dying


def half_saved(content, path):
    with open(path, "wb") as f:
        f.write(b"half of a file")


def half_deleted(folder):
    """Only the state that a run resumes from is gone."""
    path = os.path.join(folder, "training_state.pt")
    if os.path.exists(path):
        os.remove(path)


def nothing_done(*args):
    """Renaming is done whole or not at all."""


def counts_steps(steps, train_step):
    def counting(run):
        steps.append(run.step)
        return train_step(run)
    return counting


WRITING = (
    (torch, "save", half_saved),
    (os, "replace", nothing_done),
    (shutil, "rmtree", half_deleted),
)


@pytest.mark.parametrize("owner, name, half_done", WRITING, ids=("save", "replace", "rmtree"))
def test_resume_after_a_kill_in_the_middle_of_a_save(
        small_run, monkeypatch, tmp_path, owner, name, half_done):
    """A half-written folder that loads, or an old one deleted before the new one stood. Killed at
    every single call of what writes, renames and deletes."""
    config, _ = small_run
    config.epochs = 0.4
    config.save_every = 1
    config.eval_every = 9
    config.keep_checkpoints = 1
    expected = train_into(tmp_path / "whole-dflash", config)
    left = sorted(os.listdir(tmp_path / "whole-dflash"))
    assert left == ["log.jsonl", "step-000002", "training.png"]

    is_finished = False
    call = 0
    while not is_finished:
        call += 1
        folder = tmp_path / f"{call}-dflash"
        steps = []
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, killed_at(call, getattr(owner, name), half_done))
            patch.setattr(train, "train_step", counts_steps(steps, train.train_step))
            try:
                train_into(folder, config)
                is_finished = True
            except Killed:
                pass
        for step_folder in folder.glob("step-??????"):
            assert len(os.listdir(step_folder)) == 5, "half of a checkpoint that looks whole"
        newest = newest_checkpoint(str(folder))
        if len(steps) == 2:  # the first one had been saved
            assert newest.endswith(("step-000001", "step-000002")), call
            assert load_drafter(newest, nano()[0].config)
        has_checkpoint = newest != str(folder)
        assert_same(train_into(folder, config, resume=has_checkpoint), expected)
    assert call > 2


def test_resume_after_kill_9(small_run, tmp_path):
    """The same with a real kill -9 at any moment of a real process. For more of them:
    KILLS=20 python test_all.py kill_9"""
    config, _ = small_run
    config.epochs = 4.0
    config.save_every = 1
    config.eval_every = 9
    config.keep_checkpoints = 2
    config.decode_prompts = 1
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
        newest = newest_checkpoint(str(folder))
        print(f"killed after {os.path.basename(newest)}, left {sorted(os.listdir(folder))}")
        has_checkpoint = newest != str(folder)
        if has_checkpoint:
            assert load_drafter(newest, nano()[0].config)
        assert_same(train_into(folder, config, resume=has_checkpoint), expected)


def test_disk_full_keeps_the_old_checkpoint(small_run, monkeypatch, tmp_path):
    """A full disk that costs the last good checkpoint, or leaves half of one; an error that does
    not say so."""
    config, _ = small_run
    config.keep_checkpoints = 1
    folder = tmp_path / "full-dflash"
    save_checkpoint = train.save_checkpoint

    def full(*args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        def save_on_a_full_disk(run):
            if run.step > 3:
                patch.setattr(torch, "save", full)
            return save_checkpoint(run)

        patch.setattr(train, "save_checkpoint", save_on_a_full_disk)
        hint = "cannot write .*step-000006, its disk has .* No space left.*make room"
        with pytest.raises(ValueError, match=hint):
            train_into(folder, config)
    assert sorted(os.listdir(folder)) == ["log.jsonl", "step-000003", "training.png"]
    expected = train_into(tmp_path / "whole-dflash", config)
    assert_same(train_into(folder, config, resume=True), expected)

# ------------------------------------------------------------------------------------------------
# runs of several processes


RANKS = """
import os
import shutil
import signal
import sys

import torch.distributed as dist

from training import parallel
import train
from configurator import configure

config_file, folder = sys.argv[1:]

def go(name, *flags):
    out_dir = f"--out_dir={folder}/{name}-dflash"
    config = configure(vars(train), [config_file, out_dir, "--grad_accum_steps=1", *flags])
    run, held_out, _ = train.setup(config)
    train.loop(run, held_out)

parallel.join_processes("cpu")
go("ddp")
go("fsdp", "--parallel=fsdp")
go("muon", "--parallel=fsdp", "--optimizer=muon")
if parallel.rank() == 0:
    shutil.copytree(f"{folder}/ddp-dflash/step-000005", f"{folder}/again-dflash/step-000005")
dist.barrier()
go("again", "--parallel=ddp", "--resume")
if parallel.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
dist.barrier()
print("not reached")
"""


def run_two_processes(folder, config):
    """Run RANKS under torchrun, which must end it as soon as one of the processes is killed."""
    (folder / "ranks.py").write_text(RANKS)
    config_file = write_config(folder / "small.py", config, skip=("out_dir", "grad_accum_steps"))
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2",
        str(folder / "ranks.py"), str(config_file), str(folder)]
    environment = os.environ | {"PYTHONPATH": ROOT, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 1, done.stderr[-3000:]
    assert "SIGKILL" in done.stderr, done.stderr[-3000:]
    assert "not reached" not in done.stdout


def test_ranks_are_the_same_run(small_run, tmp_path):
    """Failures 12 and 13: two gloo processes, DDP and FSDP, with unequal supervised counts, follow
    one process with twice the grad_accum_steps; their checkpoints resume on one process, and on two to
    the bit; a dead rank ends all."""
    config, _ = small_run
    config.epochs = 2.0
    config.save_every = 5
    config.keep_checkpoints = 9
    config.eval_every = 5
    config.grad_clip = 0.5
    run_two_processes(tmp_path, config)
    one = train_into(tmp_path / "one-dflash", config)
    one_muon = train_into(tmp_path / "one_muon-dflash", changed(config, optimizer="muon"))

    # the losses of all steps, and the acceptance, which is counted
    # (Muon's products are in bf16. Those of shards are added up in another order: a step differs
    # by 3 percent.)
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
        leaves = torch.utils._pytree.tree_leaves(read_state(ddp)[part])
        leaves_again = torch.utils._pytree.tree_leaves(read_state(again)[part])
        assert len(leaves) == len(leaves_again)
        for a, b in zip(leaves, leaves_again):
            if isinstance(a, torch.Tensor):
                assert torch.equal(a, b), part
            else:
                assert a == b, part

    # two sharded processes, then one
    fsdp = tmp_path / "fsdp-dflash" / "step-000010"
    assert sorted(os.listdir(fsdp)) == sorted(os.listdir(tmp_path / "one-dflash" / "step-000010"))
    assert load_drafter(str(fsdp), nano()[0].config)
    back = tmp_path / "back-dflash"
    shutil.copytree(tmp_path / "fsdp-dflash" / "step-000005", back / "step-000005")
    resumed = train_into(back, config, resume=True)
    for name, weight in one.weights.items():
        assert apart(resumed.weights[name], weight) < 1e-4, name
    with pytest.raises(ValueError, match="grad_accum_steps x ranks was 2, is 1"):
        train_into(back, changed(config, grad_accum_steps=1), resume=True)

# ------------------------------------------------------------------------------------------------
# where a run begins and ends


CODE_THAT_RAN = []


class Evil:
    """A pickle that runs code when it is loaded."""
    def __reduce__(self):
        return run_code, ()


def run_code():
    CODE_THAT_RAN.append("code of the file")


@pytest.fixture
def specforge(small_run, tmp_path):
    """(config, outcome of our run, folder, its state): a checkpoint in SpecForge's layout, made of
    one of ours at step 3. It has no fp32 weights, and counts micro-batches."""
    config, _ = small_run
    config.keep_checkpoints = 9
    ours = train_into(tmp_path / "ours-dflash", config)
    folder = tmp_path / "theirs-dflash"
    shutil.copytree(tmp_path / "ours-dflash" / "step-000003", folder)
    state = {
        "epoch": 0,
        "global_step": 6,
        "args": argparse.Namespace(learning_rate=1e-2, output_dir="x"),
        "optimizer_state_dict": read_state(folder)["optimizer_state_dict"],
        "scheduler_state_dict": {"last_epoch": 2}}
    torch.save(state, folder / "training_state.pt")
    return changed(config, resume_from=str(folder)), ours, folder, state


def test_specforge_checkpoints_are_gone_on_from(specforge, tmp_path):
    """Moments given to other parameters, or micro-batches counted as steps."""
    config, ours, _, _ = specforge
    masters = read_state(tmp_path / "ours-dflash" / "step-000003")["master_weights"]
    run, held_out, _ = train.setup(changed(config, out_dir=str(tmp_path / "x-dflash")))
    assert run.step == 3
    moments = run.optimizer.state_dict()["state"]
    for i, (name, weight) in enumerate(run.drafter.named_parameters()):
        assert torch.equal(weight, masters[name].bfloat16().float()), name
        assert moments[i]["exp_avg"].shape == weight.shape, name
    train.loop(run, held_out)
    drift = []
    for name, weight in run.drafter.state_dict().items():
        drift.append(apart(weight, ours.weights[name]))
    # the same run, but for weights that were rounded to bf16
    assert 0 < max(drift) < 0.02


def test_another_optimizers_memory_is_refused(specforge, tmp_path):
    """Muon that goes on from AdamW's moments as from its own, or ends in a KeyError."""
    config, _, _, _ = specforge
    config.out_dir = str(tmp_path / "z-dflash")
    with pytest.raises(ValueError, match="not trained with optimizer = 'muon'"):
        train.setup(changed(config, optimizer="muon"))


def test_specforge_checkpoints_that_do_not_fit_are_refused(specforge, tmp_path):
    """Moments of other parameters; or code run from a file that someone published."""
    config, ours, folder, state = specforge
    config.out_dir = str(tmp_path / "y-dflash")
    last = len(ours.moments) - 1
    reversed_moments = {i: ours.moments[last - i] for i in ours.moments}
    bad = state | {"optimizer_state_dict": {"state": reversed_moments}}
    torch.save(bad, folder / "training_state.pt")
    with pytest.raises(ValueError, match="does not fit this drafter: moment 0"):
        train.setup(config)
    torch.save(state | {"args": Evil()}, folder / "training_state.pt")
    with pytest.raises(ValueError, match="cannot read"):
        train.setup(config)
    assert not CODE_THAT_RAN


def test_rows_are_prepared_only_where_they_are_missing(small_run):
    """Rows that are made again at each start, or for another target; a preparation that failed, and
    a run that goes on."""
    config, _ = small_run
    folder = Path(config.data)
    script = folder / "prepare.py"
    script.write_text(f"import sys; open({str(folder / 'ran')!r}, 'w').write(str(sys.argv[1:]))")
    train.ensure_data(config)
    assert not (folder / "ran").exists()
    (folder / "meta.json").unlink()
    train.ensure_data(config)
    assert (folder / "ran").read_text() == f"['--target={NANO_TARGET}']"
    script.write_text("raise SystemExit(1)")
    with pytest.raises(ValueError, match="prepare.py failed"):
        train.ensure_data(config)


def test_rows_of_another_template_are_refused(small_run, tmp_path):
    """Failure 9: rows made with another tokenizer or chat template train without a word."""
    config, _ = small_run
    train.setup(config)
    for file in ("chat_template.jinja", "tokenizer.json"):
        target = nano_copy(tmp_path / file, "target")
        text = (target / file).read_text()
        (target / file).write_text(text + "\n")
        with pytest.raises(ValueError, match="another tokenizer or chat template"):
            train.setup(changed(config, target=str(target)))


def test_held_out_prompts_end_where_the_answer_begins(small_run, monkeypatch):
    """Failure 15: a prompt that holds the first token of its answer; a tau that counts the prompt's
    own token."""
    config, rows = small_run
    config.decode_prompts = 2
    asked = []
    rounds = []
    generate_many = train.generate_many

    def keep(target, drafter, prompts, *args):
        asked.extend(prompts)
        has_begun = set()
        for index, piece in generate_many(target, drafter, prompts, *args):
            if index in has_begun:
                rounds.append(piece)
            has_begun.add(index)
            yield index, piece

    monkeypatch.setattr(train, "generate_many", keep)
    config.decode_tokens = 12
    folder = os.path.join(os.path.dirname(NANO_TARGET), "drafter-dflash")
    tau = train.decode_held_out(config, folder, rows, stops=set())
    for (tokens, supervised), prompt in zip(rows, asked):
        assert prompt == tokens[supervised == 0].tolist()
    assert len(asked) == 2
    assert tau == pytest.approx((11 + 11) / len(rounds))


def test_held_out_prompts_are_decoded_by_the_keys(small_run, monkeypatch):
    """A dtype, a limit or stop ids that do not arrive. By hand: answers of 3 + 1 and 2 tokens in
    rounds, tau 6 / 3."""
    config, rows = small_run
    config.decode_prompts = 2
    config.decode_tokens = 7
    config.dtype = "bfloat16"

    def keep(target, drafter, prompts, max_new_tokens, slots, stops):
        assert target.embed_tokens.weight.dtype == torch.bfloat16
        assert drafter.fc.weight.dtype == torch.bfloat16
        assert (len(prompts), max_new_tokens, stops) == (2, 7, {5})
        return iter([(0, RoundOutput([1], 0)), (1, RoundOutput([1], 0)), (0, RoundOutput([2, 3, 4], 2)),
                     (1, RoundOutput([2, 3], 1, True)), (0, RoundOutput([5], 0, True))])

    monkeypatch.setattr(train, "generate_many", keep)
    assert train.decode_held_out(config, NANO_DRAFTER, rows, stops={5}) == 2.0
