"""
Trains a DFlash drafter for a frozen target. The target runs along and makes the features.

    python train.py config/nano.py                 # the shipped nano target, two CPU cores, minutes
    python train.py config/nano.py --resume        # go on after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/phase1_2.py   # DDP, or --parallel=fsdp
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py ..

A sample is one text of the training data: a question and the target's own answer. A step takes
batch_size x grad_accum_steps x processes samples. A checkpoint is a folder out_dir/step-000123 that
engines load; beside it stand log.jsonl, and loss, tau and acceptance as a picture. Process 0
writes; nodes share the file system that out_dir is on.

The defaults below are the recipe of the published drafter for Qwen3.5-0.8B, "Phase 1.2" of the
project la-draftery; config/phase1_2.py repeats them, with sums. A file in config/ holds what
another run changes.
"""
import functools
import math
import os
import subprocess
import sys
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import NamedTuple

import numpy as np
import torch
import torch._inductor.config

from tokenizer import load_tokenizer, stop_ids, tokenizer_fingerprint
from checkpoint import drafter_config, load_drafter, load_target, newest_checkpoint
from configurator import configure
from console import survive_closed_output
from fast.cpu import attention_by_anchor_groups
from fast.cuda_graph import Graphs
from data.samples import Samples
from draft_decode import generate_many
from training.flops import training_operations
from training.interruption import any_rank_received, stop_signals
from loss import block_labels, block_loss, chunk_loss, sample_anchors
from model import DFlashDraftModel
from training.optimizer import KINDS, new_optimizer
from training.parallel import (distribute, gather_full, gradient_exchange, is_lost_process, join_processes,
                      leave_processes, rank, sum_over_ranks, wait_for_all, world_size)
from training.log import TrainingLog
from training.checkpoints import load_moments, load_training_state, save_checkpoint

# what
target = "Qwen/Qwen3.5-0.8B"                # folder or hub id of the frozen target, or random:0.8b
data = "data/math240k"                      # folder of samples; its prepare.py makes missing ones
out_dir = "out/phase1_2-dflash"             # engines know the method by "dflash" in the path
resume = False                              # go on from the newest checkpoint in out_dir
resume_from: str | None = None               # folder of a SpecForge checkpoint to go on from
# the drafter
num_layers = 5                              # of the drafter
num_heads = 8                               # of its attention
num_kv_heads = 2                            # of its keys and values
head_dim = 256                              # channels of a head
intermediate_size = 3584                    # channels of the MLP
initializer_range = 0.02                    # standard deviation of the first weights
target_layer_ids = (3, 7, 11, 15, 19)       # target layers whose outputs are the features
block_size = 16                             # K: the anchor and K - 1 guesses
mask_token_id: int | None = None            # id of the mask; None: the first after the tokenizer
# the loss
num_anchors = 512                           # blocks of a sample
weighting = "decay"                         # of slots: decay, or dpace by the drafter's confidence
gamma = 7.0                                 # slots over which decay's weight falls to 1/e
dpace_smoothing = 0.5                       # D-PACE's a, of 0 .. 1
loss_chunk_size = 1024                      # guesses whose logits exist at once
# optimisation
batch_size = 2                              # samples of a micro-batch
grad_accum_steps = 2                            # micro-batches of a step
max_length = 3072                           # tokens of a sample; longer ones are cut
pad_to_multiple_of = 512                       # samples are padded to it: few shapes to compile for
bucket_size = 64                            # micro-batches sorted by length together: less padding
epochs = 1.0                                # passes over the samples
lr = 3e-4                                   # peak of the learning rate
warmup = 0.04                               # share of the steps up to it; then a cosine to zero
optimizer = "adamw"                         # of all weights; or muon for matrices, see training/optimizer.py
betas = (0.9, 0.999)                        # of AdamW
weight_decay = 0.0                          # times lr: the share that a weight loses in a step
grad_clip = 1.0                             # norm of the gradient at most
spike_factor = 10.0                         # a norm this many times the usual one: step skipped
max_consecutive_skips = 5                                # skipped steps in a row that end the run
seed = 0                                    # of weights, order of samples and anchors
# looking at it
log_every = 10                              # steps
eval_every = 500                            # steps between estimates on held-out samples
eval_samples = 64                           # held-out samples of an estimate
save_every = 1000                           # steps between checkpoints
keep_checkpoints = 3                        # newest checkpoints that are kept
wandb_project: str | None = None            # Weights & Biases project; None: wandb is not imported
decode_prompts = 64                         # held-out prompts really decoded at the end
decode_tokens = 512                         # new tokens of each at most
# the machine
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of products; what is trained is fp32
attention = "flex" if device == "cuda" else "grouped"    # grouped suits CPUs, both run on GPUs
compile = False                             # torch.compile, and CUDA graphs; minutes at the start
parallel = "ddp"                            # or fsdp, which also shards the frozen target

# --------------------------------------------------------------------------------------------------
# a batch


class MicroBatches:
    """Micro-batches (tokens, supervised), numbered 0, 1, 2, .. over the whole run.

    For given settings, number n depends on the seed and n alone. So no loader has a state to save,
    and processes and grad_accum_steps only share the numbers out.
    """

    def __init__(self, samples, config):
        self.samples = samples
        self.config = config
        self.lengths = np.array([len(tokens) for tokens, _ in samples])
        self.epoch = None       # the epoch that self.order belongs to
        self.order = None

    def per_epoch(self):
        """How many an epoch has. The few samples left over differ from epoch to epoch."""
        return len(self.samples) // self.config.batch_size

    def __getitem__(self, n):
        return pad([self.samples[i] for i in self.sample_numbers(n)], self.config)

    def sample_numbers(self, n):
        """The samples of micro-batch n of the run."""
        epoch, number_in_epoch = divmod(n, self.per_epoch())
        if self.epoch != epoch:
            self.epoch = epoch
            self.order = self.shuffled(epoch)
        return self.order[number_in_epoch]

    def shuffled(self, epoch):
        """The samples of all micro-batches of an epoch, (micro-batches, batch_size).

        Samples are shuffled, then sorted by length within windows of bucket_size micro-batches, so
        that little of a micro-batch is padding. Finally the micro-batches are shuffled: a run that
        saw short samples first would learn another distribution than that of the data.
        """
        random = np.random.default_rng((self.config.seed, epoch))
        batch_size = self.config.batch_size
        numbers = random.permutation(len(self.samples))[:self.per_epoch() * batch_size]
        window = self.config.bucket_size * batch_size
        for first in range(0, len(numbers), window):
            part = numbers[first:first + window]
            by_length = np.argsort(self.lengths[part], kind="stable")
            numbers[first:first + window] = part[by_length]
        return random.permutation(numbers.reshape(-1, batch_size))


def pad(samples, config):
    """(tokens, supervised), both (B, T), on the device. Padding is last, so no token sees it."""
    # The longest sample, cut at max_length, then rounded up: T takes few different values. (It may
    # be more than max_length, where this is no multiple.)
    longest = max(len(tokens) for tokens, _ in samples)
    T = min(config.max_length, longest)
    T = math.ceil(T / config.pad_to_multiple_of) * config.pad_to_multiple_of

    # fill in sample by sample; what is not filled stays token 0 and unsupervised
    is_pinned = config.device == "cuda"  # a copy from pinned memory does not wait for the device
    tokens = torch.zeros(len(samples), T, dtype=torch.long, pin_memory=is_pinned)
    supervised = torch.zeros(len(samples), T, dtype=torch.bool, pin_memory=is_pinned)
    for i, (sample_tokens, sample_mask) in enumerate(samples):
        n = min(len(sample_tokens), config.max_length)
        tokens[i, :n] = torch.from_numpy(sample_tokens[:n])
        supervised[i, :n] = torch.from_numpy(sample_mask[:n] > 0)
    tokens = tokens.to(config.device, non_blocking=True)
    supervised = supervised.to(config.device, non_blocking=True)
    return tokens, supervised

# --------------------------------------------------------------------------------------------------
# one step


@dataclass
class GradientGuard:
    """What gradients usually are like. Saved, as a resumed run must skip the same steps."""
    usual_norm: float = 0.0         # moving average of the norms of steps that were made
    skipped: int = 0                # steps
    skipped_in_a_row: int = 0

    def record(self, grad_norm, is_skipped):
        if is_skipped:
            self.skipped += 1
            self.skipped_in_a_row += 1
        else:
            self.usual_norm = 0.98 * (self.usual_norm or grad_norm) + 0.02 * grad_norm
            self.skipped_in_a_row = 0


@dataclass
class Run:
    """A training run: its settings, its models and where it stands."""
    config: SimpleNamespace
    target: torch.nn.Module
    drafter: DFlashDraftModel
    wrapped_drafter: torch.nn.Module    # by DDP; the drafter itself under FSDP or alone
    optimizer: torch.optim.Optimizer
    micro_batches: MicroBatches
    total_steps: int
    target_graphs: Graphs | None = None # the target's forward as a CUDA graph (fast/cuda_graph.py) for
                                        # each shape of samples; None: it runs without
    step: int = 0
    guard: GradientGuard = field(default_factory=GradientGuard)


class BlockSums(NamedTuple):
    """Sums over a micro-batch and its blocks, in fp64. Added up they are those of a whole step."""
    loss: torch.Tensor
    weight: torch.Tensor
    blocks: torch.Tensor
    tokens: torch.Tensor            # with padding
    operations: torch.Tensor
    right_up_to: torch.Tensor       # (K-1,) blocks whose guesses are right up to this slot
    reached: torch.Tensor           # (K-1,) blocks whose response is long enough for this slot


compiled_chunk_loss = torch.compile(chunk_loss, dynamic=False)  # compiled when first called


def micro_batch_loss(run, tokens, supervised, generator, trained_module=None):
    """The loss of a micro-batch, summed over its blocks, and its BlockSums.

    trained_module: what wraps the drafter to exchange gradients; None: the drafter itself, as for
    an estimate, which has no backward.
    """
    config, target, drafter = run.config, run.target, run.drafter
    if trained_module is None:
        trained_module = drafter

    # blocks at random places of the responses, what they should guess, and what each slot weighs
    anchors, real = sample_anchors(
        supervised, config.num_anchors, generator, config.max_length)
    labels, weights = block_labels(
        tokens, supervised, anchors, real, drafter.block_size, config.gamma)
    inside = weights > 0  # slots that count: all that D-PACE takes from these weights

    # the frozen target reads the samples
    features = target_features(run, tokens)

    # the drafter: all blocks at once. Its weights are fp32, its products bf16 where dtype says so.
    anchor_tokens = tokens.gather(1, anchors)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        embedded = drafter.embed_block(anchor_tokens, target.embed_tokens.weight)
        attend = attention_by_anchor_groups if config.attention == "grouped" else None
        hidden = trained_module(features, embedded, anchors, attend)

    # the target's head and the loss, in one pass that also yields the gradient by `hidden`
    chunk_loss_function = compiled_chunk_loss if config.compile else chunk_loss
    if config.weighting == "dpace":
        chunk_loss_function = functools.partial(
            chunk_loss_function, dpace_smoothing=config.dpace_smoothing)
    loss, _, correct, used_weights = block_loss(
        hidden,
        target.head_weight,
        labels,
        weights,
        config.loss_chunk_size,
        chunk_loss_function)

    # What the step and its log are made of. torch.full lets a GPU fill in a number; a copy of one
    # would first wait until the GPU has done all that it was told before.
    right_up_to = (correct & inside).long().cumprod(-1)
    token_count = torch.full((), tokens.numel(), dtype=torch.float64, device=tokens.device)
    operations = training_operations(drafter, *tokens.shape, anchors.shape[1], target)
    operations = torch.full((), operations, dtype=torch.float64, device=tokens.device)
    sums = BlockSums(
        loss=loss.detach().double(),
        weight=used_weights.sum().double(),
        blocks=real.sum().double(),
        tokens=token_count,
        operations=operations,
        right_up_to=right_up_to.sum((0, 1)).double(),
        reached=inside.sum((0, 1)).double())
    return loss, sums


def target_features(run, tokens):
    """Features (B, T, ...) of tokens (B, T), from the frozen target.

    Those of a graph hold until the next call only. That is long enough, as the backward of a
    micro-batch ends before the next micro-batch begins, and an estimate has no backward.
    """
    def forward(tokens):
        # layers above the last that gives features are not run
        features, _ = run.target(
            tokens, target_layer_ids=run.drafter.target_layer_ids, features_only=True)
        return features

    with torch.no_grad():
        if run.target_graphs is None:
            return forward(tokens)
        return run.target_graphs.run(tokens.shape, forward, tokens)


def add_sums(a, b):
    """The sums of both together; a may be None."""
    if a is None:
        return b
    return BlockSums(*[x + y for x, y in zip(a, b)])


def train_step(run):
    """One optimizer step. Returns what is logged of it, and its BlockSums.

    Loss, gradients and weights are summed over micro-batches and processes and divided once. So it
    does not matter (but for rounding) how samples were split, nor that some have longer answers.
    """
    config = run.config

    # Gradients add up over the micro-batches of this process. Each micro-batch of the run has a
    # number; the processes take them in turn.
    sums = None
    for micro in range(config.grad_accum_steps):
        is_last = micro == config.grad_accum_steps - 1
        number = (run.step * config.grad_accum_steps + micro) * world_size() + rank()
        generator = anchor_generator(config.seed, number)
        tokens, supervised = run.micro_batches[number]
        with gradient_exchange(run.wrapped_drafter, is_last):
            loss, micro_sums = micro_batch_loss(
                run, tokens, supervised, generator, run.wrapped_drafter)
            loss.backward()
        sums = add_sums(sums, micro_sums)
    sums = BlockSums(*[sum_over_ranks(x) for x in sums])

    # From sums to means by weight. If all samples of a step were cut before their answer, its
    # weight is 0, and the clamp leaves gradients of 0.
    weight = sums.weight.clamp(min=1e-9)
    # DDP and FSDP average the gradients of the processes. Times their number that is the sum, and
    # `weight` is the sum over all of them already.
    factor = world_size() / weight
    for parameter in run.drafter.parameters():
        parameter.grad *= factor.to(parameter.dtype)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.drafter.parameters(), config.grad_clip)

    # Up to here a GPU is only told what to do. Now the processor waits for it: for the norm, by
    # which it decides. What the log needs is read at the same time, so that nothing waits again.
    grad_norm = gather_full(grad_norm).item()  # the norm before it was clipped
    sums = BlockSums(*[x.cpu() for x in sums])

    # the step itself, unless the gradient is broken
    is_skipped = is_unusual(grad_norm, run)
    run.guard.record(grad_norm, is_skipped)
    lr = learning_rate(run.step, run.total_steps, config)
    if not is_skipped:
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.guard.skipped_in_a_row == config.max_consecutive_skips:
        raise ValueError(describe_skipped_step(run, grad_norm))
    run.step += 1

    # what the log says of this step
    tau, accepted_up_to_slot = acceptance(sums)
    entry = {"lr": lr, "loss": mean_loss(sums), "grad_norm": grad_norm, "tau": tau,
             "accepted_up_to_slot": accepted_up_to_slot, "skipped": run.guard.skipped}
    return entry, sums


def anchor_generator(seed, number):
    """The generator that draws the anchors of micro-batch `number`."""
    mixed = np.random.SeedSequence((seed, number)).generate_state(1)[0]
    return torch.Generator().manual_seed(int(mixed))


def learning_rate(step, total_steps, config):
    """Linear warm-up, then a cosine to zero."""
    warmup_steps = max(1, round(config.warmup * total_steps))
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def is_unusual(grad_norm, run):
    """Whether a gradient is not finite, or far longer than usual: such a step is skipped.

    One NaN would ruin weights and moments of a run of days. During warm-up nothing is usual yet.
    """
    if not math.isfinite(grad_norm):
        return True
    in_warmup = run.step < run.config.warmup * run.total_steps
    if in_warmup or run.guard.usual_norm == 0:
        return False
    return grad_norm > run.config.spike_factor * run.guard.usual_norm


def describe_skipped_step(run, grad_norm):
    """The line with which a run ends: the norm, what is usual, and the samples of the step."""
    config = run.config
    micro_batches_of_a_step = config.grad_accum_steps * world_size()
    first = run.step * micro_batches_of_a_step
    sample_numbers = []
    for number in range(first, first + micro_batches_of_a_step):
        sample_numbers.extend(run.micro_batches.sample_numbers(number).tolist())
    return (f"the gradient of step {run.step + 1} has norm {grad_norm:.3g}, usual is "
            f"{run.guard.usual_norm:.3g}, steps skipped in a row: {config.max_consecutive_skips}. Look at "
            f"samples {sample_numbers} of {config.data} (split train), or lower lr")


def mean_loss(sums):
    """The weighted mean of the guesses' losses; 0 if no guess had a weight."""
    return (sums.loss / sums.weight.clamp(min=1e-9)).item()


def acceptance(sums):
    """tau as training estimates it, and the share of blocks that are right up to each slot, (K-1,).

    tau is 1 (the target's own token) and the mean number of right guesses before the first wrong
    one. A share is taken of the blocks whose response reaches the slot.
    """
    tau = 1 + (sums.right_up_to.sum() / sums.blocks.clamp(min=1)).item()
    accepted_up_to_slot = sums.right_up_to / sums.reached.clamp(min=1)
    return tau, accepted_up_to_slot.tolist()


def estimate(run, samples):
    """Loss, tau and acceptance on held-out samples, with anchors that are the same every time.

    It may read higher than decoding does: its anchors stand at random places, while those of
    decoding stand where a guess has just failed. At the end of a response it reads lower, as slots
    past it count for nothing.

    Every process makes the same estimate. Batches are as large as in training and gradients are on:
    compiled code would be compiled anew for another shape or mode. So samples that fill no batch
    are left out, unless there are no others.
    """
    batch_size = run.config.batch_size
    count = min(run.config.eval_samples, len(samples))
    full_batches = max(1, count // batch_size)
    sums = None
    for number in range(full_batches):
        first = number * batch_size
        end = min(first + batch_size, count)
        tokens, supervised = pad([samples[i] for i in range(first, end)], run.config)
        generator = torch.Generator().manual_seed(first)
        _, batch_sums = micro_batch_loss(run, tokens, supervised, generator)
        sums = add_sums(sums, batch_sums)
    tau, accepted_up_to_slot = acceptance(sums)
    return {"loss": mean_loss(sums), "tau": tau, "accepted_up_to_slot": accepted_up_to_slot}

# --------------------------------------------------------------------------------------------------
# the loop


def loop(run, held_out):
    """Train up to run.total_steps; returns the folder of the last checkpoint.

    SIGTERM and Ctrl-C let the step end in every process, save, and leave by SystemExit with a line
    that says how to go on.
    """
    config = run.config
    os.makedirs(config.out_dir, exist_ok=True)
    folder = newest_checkpoint(config.out_dir)  # what is returned if no step is left to do
    log = TrainingLog(run)
    is_stopped = False
    with stop_signals() as received:
        try:
            while run.step < run.total_steps and not is_stopped:
                entry, sums = train_step(run)
                log.count(sums)
                # processes hear of a signal at different times, so they agree on it
                is_stopped = any_rank_received(received, config.device)
                is_end = run.step == run.total_steps

                # a line of the log, an estimate on held-out samples, a checkpoint: each in its own
                # rhythm, and at the end
                if run.step % config.log_every == 0 or is_end:
                    log.training(run, entry)
                if run.step % config.eval_every == 0 or is_end:
                    log.held_out(run, estimate(run, held_out))
                if run.step % config.save_every == 0 or is_end or is_stopped:
                    folder = save_checkpoint(run)
        finally:
            log.close()  # also after an error: its picture shows how that came about
    if is_stopped and run.step < run.total_steps:
        raise SystemExit(how_to_go_on(run, folder) if rank() == 0 else 1)
    return folder


def how_to_go_on(run, folder):
    """The command that goes on: this run's own, with --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    arguments = " ".join([*words, "--resume"])
    command = "python" if world_size() == 1 else "torchrun ..., as before,"
    return f"stopped at step {run.step}, saved {folder}; to go on: {command} train.py {arguments}"

# --------------------------------------------------------------------------------------------------
# setting up


def setup(config):
    """(run, held-out samples, stop ids): everything, from nothing or from a checkpoint."""
    # what can be wrong is found before anything large is loaded
    check_config(config)
    deterministic_kernels()
    checkpoint = checkpoint_to_go_on_from(config)
    tokenizer = None  # a target with random weights, which is there to measure, has none
    stops = set()
    if not config.target.startswith("random:"):
        tokenizer = load_tokenizer(config.target)
        stops = stop_ids(tokenizer)

    # the target, and samples that were made with its tokenizer and template
    target = load_target(config.target, config.device, config.dtype)
    ensure_data(config)
    vocab_size = target.config.vocab_size
    fingerprint = tokenizer_fingerprint(config.target)
    samples = Samples(config.data, "train", vocab_size, fingerprint)
    held_out = Samples(config.data, "val", vocab_size, fingerprint)

    mask_token_id = mask_id(config, tokenizer, vocab_size)

    # The drafter, new or as it was saved. Weights go in before anything is sharded, moments after.
    drafter = new_drafter(config, target.config, mask_token_id)
    saved = None
    if checkpoint is not None:
        saved = load_training_state(checkpoint, drafter, target.config, config)
    run = new_run(config, target, drafter, samples)
    if saved is not None:
        load_moments(run.optimizer, saved.moments)
        run.step = saved.step
        if saved.guard is not None:
            run.guard = GradientGuard(**saved.guard)
    if run.total_steps < 1:
        raise ValueError(f"{len(samples)} samples make no step of {config.batch_size} x "
                         f"{config.grad_accum_steps * world_size()} samples: lower batch_size")
    return run, held_out, stops


def mask_id(config, tokenizer, vocab_size):
    """The id of the mask, as set, or the first that the tokenizer leaves free: embeddings have some
    rows to spare. Without a tokenizer it is the last."""
    mask_token_id = config.mask_token_id
    if mask_token_id is None and tokenizer is None:
        mask_token_id = vocab_size - 1
    elif mask_token_id is None:
        mask_token_id = len(tokenizer)
    if not 0 <= mask_token_id < vocab_size:
        raise ValueError(f"mask_token_id = {mask_token_id} is outside the target's vocabulary of "
                         f"{vocab_size}")
    return mask_token_id


def new_drafter(config, target_config, mask_token_id):
    """An untrained drafter by the settings of a run; always the same for a seed."""
    shape = drafter_config(
        target_config, config.num_layers, config.target_layer_ids, mask_token_id, config.num_heads,
        config.num_kv_heads, config.head_dim, config.intermediate_size, config.block_size,
        config.initializer_range)
    torch.manual_seed(config.seed)
    return DFlashDraftModel(shape).to(config.device)


def new_run(config, target, drafter, samples):
    """A run at step 0 from loaded models and samples."""
    # Lengths of samples x kinds of layer. torch.compile gives up after 8 versions of a function.
    # Also without --compile, as flex_attention is always compiled: plain, it holds all scores.
    torch._dynamo.config.recompile_limit = 64
    if config.compile:
        compile_layers(target, drafter)
    wrapped_drafter = distribute(target, drafter, config.parallel, config.device)
    micro_batches = MicroBatches(samples, config)
    optimizer = new_optimizer(
        config.optimizer, drafter.parameters(), config.lr, config.betas, config.weight_decay)
    micro_batches_of_a_step = config.grad_accum_steps * world_size()
    total_steps = int(config.epochs * micro_batches.per_epoch()) // micro_batches_of_a_step
    target_graphs = new_target_graphs(config)
    return Run(config, target, drafter, wrapped_drafter, optimizer, micro_batches, total_steps,
               target_graphs)


def new_target_graphs(config):
    """What records the target's forward as CUDA graphs; None where it is not recorded.

    Graphs belong to --compile: shapes are few there, and warm_up() meets them all. FSDP gathers the
    weights of the target layer by layer, at addresses that a graph could not know.
    """
    if not config.compile or config.device != "cuda" or config.parallel == "fsdp":
        return None
    return Graphs(torch.device(config.device))


def compile_layers(target, drafter):
    """Compile each layer by itself: all of a kind share the code, and little of it is compiled.

    With static shapes, as these are faster; pad() makes few of them.
    """
    for layer in (*target.layers, *drafter.layers):
        layer.compile(dynamic=False)


def warm_up(run):
    """Compile every length of samples before the first step, so that none is met late.

    Each length goes through twice: the first forward of the target is a plain one, and the second
    is recorded as a graph. The longest comes first, so that shorter ones reuse its memory.
    """
    config = run.config
    multiple = config.pad_to_multiple_of
    lengths = range(multiple, config.max_length + multiple, multiple)
    for T in reversed(lengths):
        tokens = torch.zeros(config.batch_size, T, dtype=torch.long, device=config.device)
        supervised = torch.ones_like(tokens, dtype=torch.bool)
        for _ in range(2):
            generator = torch.Generator()
            loss, _ = micro_batch_loss(run, tokens, supervised, generator, run.wrapped_drafter)
            loss.backward()
            run.optimizer.zero_grad(set_to_none=True)


def deterministic_kernels():
    """Kernels chosen by rule, not by time, and none that sums in whatever order threads arrive.

    A resumed run has to choose the same ones. torch warns where it has no such kernel.
    """
    torch._inductor.config.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    # filling fresh memory costs 5 % and changes no result here
    torch.utils.deterministic.fill_uninitialized_memory = False


def check_config(config):
    """ValueError for values of the configuration that no run can have."""
    choices = {"weighting": ("decay", "dpace"), "optimizer": KINDS,
               "attention": ("flex", "grouped"),
               "parallel": ("ddp", "fsdp"), "device": ("cpu", "cuda")}
    for key, allowed in choices.items():
        value = getattr(config, key)
        if value not in allowed:
            raise ValueError(f"{key} = {value!r}: use {' or '.join(allowed)}")
    if config.attention == "flex" and config.device == "cpu":
        raise ValueError("attention = 'flex' has no backward on CPUs: use grouped")
    for key in ("keep_checkpoints", "batch_size", "grad_accum_steps", "num_anchors", "pad_to_multiple_of",
                "max_consecutive_skips", "eval_samples"):
        value = getattr(config, key)
        if value < 1:
            raise ValueError(f"{key} = {value}: use 1 or more")
    if config.initializer_range <= 0:
        raise ValueError(f"initializer_range = {config.initializer_range}: first weights need a "
                         "standard deviation above 0, as 0.02")


def checkpoint_to_go_on_from(config):
    """The folder that this run goes on from; None for a new run."""
    newest = newest_checkpoint(config.out_dir)  # out_dir itself if it has none
    has_checkpoint = os.path.basename(newest).startswith("step-")
    if has_checkpoint and not config.resume:
        raise ValueError(f"{config.out_dir} holds a run ({os.path.basename(newest)}): --resume "
                         "goes on with it, --out_dir=... starts another")
    if config.resume and not has_checkpoint:
        raise ValueError(f"nothing to resume: {config.out_dir} holds no step-* checkpoint")
    if config.resume:
        return newest
    return config.resume_from


def ensure_data(config):
    """Run the data folder's own prepare.py if its rows are missing; the other processes wait."""
    script = os.path.join(config.data, "prepare.py")
    is_missing = not os.path.exists(os.path.join(config.data, "meta.json"))
    if rank() == 0 and is_missing and os.path.exists(script):
        print(f"{config.data} has no rows yet: running {script}", flush=True)
        command = [sys.executable, script, f"--target={config.target}"]
        if subprocess.run(command).returncode != 0:
            raise ValueError(f"{script} failed; its message stands above")
    wait_for_all()

# --------------------------------------------------------------------------------------------------
# the command


DECODE_SLOTS = 8  # prompts decoded at once: more is faster, and each takes memory


def decode_held_out(config, folder, samples, stops):
    """tau of real greedy decoding on held-out prompts, all tokens over all rounds.

    It decodes with the saved checkpoint, and with a target that is loaded anew, as the one that was
    trained with may be sharded or compiled.
    """
    target = load_target(config.target, config.device, config.dtype)
    drafter = load_drafter(folder, target.config, config.device, config.dtype)
    prompts = []
    for i in range(min(config.decode_prompts, len(samples))):
        tokens_of_sample, mask = samples[i]
        prompts.append(tokens_of_sample[:int(mask.argmax())].tolist())  # up to the answer
    token_count = 0
    round_count = 0
    has_begun = set()
    for index, piece in generate_many(
            target, drafter, prompts, config.decode_tokens, DECODE_SLOTS, stops):
        if index in has_begun:
            round_count += 1
            token_count += len(piece.tokens)
        has_begun.add(index)  # its first piece is the prompt's own token, in no round
    return token_count / max(1, round_count)


def train(config):
    """Set up, train, decode held-out prompts with the result, and print what came of it."""
    join_processes(config.device)
    run, held_out, stops = setup(config)

    # say what will be done
    drafter_size = sum(p.numel() for p in run.drafter.parameters())
    target_size = sum(p.numel() for p in run.target.parameters())
    sample_count = len(run.micro_batches.samples)
    print(f"{drafter_size:,} parameters to train for a target of {target_size:,} | "
          f"{sample_count:,} samples, {run.total_steps:,} steps on {world_size()} x "
          f"{config.device}", flush=True)
    if config.wandb_project and rank() == 0:
        import wandb
        name = os.path.basename(os.path.normpath(config.out_dir))
        wandb.init(project=config.wandb_project, name=name, config=vars(config))

    # do it; compiling first, or the first step of each length would take a minute
    if config.compile:
        warm_up(run)
    folder = loop(run, held_out)

    # process 0 tries the result by real decoding
    is_writer = rank() == 0
    leave_processes()
    if not is_writer:
        return
    del run  # its memory is needed now
    tau = decode_held_out(config, folder, held_out, stops)
    prompts = min(config.decode_prompts, len(held_out))
    print(f"wrote {folder} and {config.out_dir}/training.png\n"
          f"try it: python draft_decode.py --target={config.target} --drafter={folder} "
          f"--prompt \"...\"\n"
          f"held-out tau from real decoding: {tau:.3f} ({prompts} prompts)")


def main(argv=None):
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = open(os.devnull, "w")  # process 0 speaks; errors go to stderr everywhere
    survive_closed_output()
    config = configure(globals(), argv)
    try:
        train(config)
    except (ValueError, OSError) as error:  # OSError: out_dir cannot be written
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        sys.exit(f"error: process {rank()} lost another one, whose end is reported below or on its "
                 "node: --resume goes on from the last checkpoint")
    except KeyboardInterrupt:
        sys.exit("interrupted while no step was under way: nothing is lost. If there is a "
                 "checkpoint, --resume goes on from it")


if __name__ == "__main__":
    main()
