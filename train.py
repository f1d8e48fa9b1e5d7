"""
Trains a DFlash drafter for a frozen target, which computes the features on the fly.

    python train.py config/nano.py                 # the shipped nano target, minutes on a CPU
    python train.py config/nano.py --resume        # resume after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/phase1_2.py
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py

A sample is a question and the target's own answer. In each process, a step trains on batch_size x
grad_accum_steps samples. SGLang and vLLM can load the checkpoints, out_dir/step-000123. log.jsonl
and training.png are next to them. Only process 0 writes, and the other processes read its files, so
several nodes need a shared file system.

The defaults are the recipe of "Phase 1.2", the published drafter for Qwen3.5-0.8B.
"""
import functools
import math
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from types import SimpleNamespace

import numpy as np
import torch

from checkpoint import load_drafter, load_target, newest_checkpoint, read_target_config
from configurator import configure, survive_closed_output
from draft_decode import generate_many
from fast.decoding import prepare_for_decoding
from fast.training import prepare_for_training, warm_up
from formats.files import LINE, one_line, printable
from loss import Targets, block_labels, block_loss, chunk_loss, sample_anchors
from model import DFlashDraftModel, masked_attend
from tokenizer import load_tokenizer, stop_ids
from training.checkpoints import load_moments, load_training_state, save_checkpoint
from training.flops import training_operations
from training.guard import GradientGuard, why_stopped
from training.interruption import any_rank_received, how_to_resume, stop_signals
from training.log import (
    BlockSums, TrainingLog, add_up, block_sums, figures, how_to_use, start_wandb)
from training.optimizer import new_optimizer
from training.parallel import (
    distribute, gather_full, gradient_exchange, is_lost_process, join_processes, leave_processes,
    rank, sum_over_ranks, world_size)
from training.setup import (
    check_config, checkpoint_to_resume, deterministic_kernels, load_samples, new_drafter,
    prepare_data)

# what
target = "Qwen/Qwen3.5-0.8B"                # folder or hub id of the frozen target, or random:0.8b
data = "data/math240k"                      # folder of samples; its prepare.py makes missing ones
out_dir = "out/phase1_2-dflash"             # vLLM recognizes the method by "dflash" in the path
resume = False                              # resume from the newest checkpoint in out_dir
resume_from: str | None = None              # resume from this folder of a SpecForge checkpoint
# the drafter
num_layers = 5                              # decoder layers
num_heads = 8                               # attention heads
num_kv_heads = 2                            # heads of keys and values
head_dim = 256                              # channels per head
intermediate_size = 3584                    # channels of the MLP
initializer_range = 0.02                    # standard deviation of the first weights
target_layer_ids = (3, 7, 11, 15, 19)       # target layers whose outputs are the features
block_size = 16                             # K: the anchor and K - 1 guesses
mask_token_id: int | None = None            # None: the first id after the tokenizer's
# the loss
num_anchors = 512                           # blocks per sample
weighting = "decay"                         # of guesses: decay, or dpace (the drafter's confidence)
gamma = 7.0                                 # positions after which a weight has fallen to 1/e
# optimization
batch_size = 2                              # samples per micro-batch
grad_accum_steps = 2                        # micro-batches per step and process
max_length = 3072                           # longer samples are cut to this many tokens
pad_to_multiple_of = 512                    # fewer different lengths, so fewer to compile
bucket_size = 64                            # samples of so many micro-batches are sorted by length
epochs = 1.0                                # passes over the samples
lr = 3e-4                                   # peak learning rate
warmup = 0.04                               # fraction of steps spent warming up; then cosine to 0
optimizer = "adamw"                         # adamw, or muon for matrices (training/optimizer.py)
betas = (0.9, 0.999)                        # of AdamW
weight_decay = 0.0                          # of AdamW and Muon
grad_clip = 1.0                             # maximum norm of the gradient
seed = 0                                    # of weights, sample order, and anchors
# logging
log_every = 10                              # steps per line of the log; 0: never
eval_every = 500                            # steps between evaluations on held-out data; 0: never
save_every = 1000                           # steps between checkpoints; 0: never before the end
decode_prompts = 64                         # held-out prompts to decode after training
wandb_project: str | None = None            # Weights & Biases project; None: wandb is not needed
# the machine
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of matmuls; trained weights are float32
compile = False                             # torch.compile and CUDA graphs; minutes at the start
parallel = "ddp"                            # or fsdp, which also shards the frozen target

DPACE_SMOOTHING = 0.5   # D-PACE's a, see dpace_weights() in loss.py
EVAL_SAMPLES = 64       # held-out samples per evaluation
DECODE_TOKENS = 512     # max new tokens per held-out prompt
DECODE_SLOTS = 8        # prompts decoded together: more are faster but take more memory

# --------------------------------------------------------------------------------------------------
# a batch


class MicroBatches:
    """Micro-batches (tokens, supervised), numbered 0, 1, 2, ... over the whole run.

    Micro-batch n depends only on the settings, the seed, and n. So there is no loader state to
    save, and processes just divide the numbers among themselves.
    """

    def __init__(self, samples, config):
        self.samples = samples
        self.config = config
        self.lengths = np.array([len(tokens) for tokens, _ in samples])
        # each epoch leaves out a few samples, different ones each time
        self.per_epoch = len(samples) // config.batch_size
        self.order = functools.lru_cache(1)(self.shuffled)  # computed once per epoch

    def __getitem__(self, n):
        return pad([self.samples[i] for i in self.sample_numbers(n)], self.config)

    def sample_numbers(self, n):
        """Indices of the samples in micro-batch n."""
        epoch, number_in_epoch = divmod(n, self.per_epoch)
        return self.order(epoch)[number_in_epoch]

    def shuffled(self, epoch):
        """Indices of the samples in all micro-batches of an epoch, (micro-batches, batch_size).

        Samples are shuffled. Within windows of bucket_size micro-batches they are sorted by length,
        which saves padding. Then the micro-batches are shuffled, so that short samples do not come
        first.
        """
        random = np.random.default_rng((self.config.seed, epoch))
        batch_size = self.config.batch_size
        numbers = random.permutation(len(self.samples))[:self.per_epoch * batch_size]
        window = self.config.bucket_size * batch_size
        for first in range(0, len(numbers), window):
            part = numbers[first:first + window]
            by_length = np.argsort(self.lengths[part], kind="stable")
            numbers[first:first + window] = part[by_length]
        return random.permutation(numbers.reshape(-1, batch_size))


def pad(samples, config):
    """(tokens, supervised), both (B, T), on the device. Padding comes last, so no token sees it."""
    # cut the longest sample to max_length, then round up, so that T takes few different values
    longest = max(len(tokens) for tokens, _ in samples)
    T = min(config.max_length, longest)
    T = math.ceil(T / config.pad_to_multiple_of) * config.pad_to_multiple_of

    # padding is token 0, unsupervised
    is_pinned = config.device == "cuda"  # a copy from pinned memory does not wait for the GPU
    tokens = torch.zeros(len(samples), T, dtype=torch.long, pin_memory=is_pinned)
    supervised = torch.zeros(len(samples), T, dtype=torch.bool, pin_memory=is_pinned)
    for i, (sample_tokens, sample_mask) in enumerate(samples):
        n = min(len(sample_tokens), config.max_length)
        tokens[i, :n] = torch.from_numpy(sample_tokens[:n])
        supervised[i, :n] = torch.from_numpy(sample_mask[:n] > 0)
    device = config.device
    return tokens.to(device, non_blocking=True), supervised.to(device, non_blocking=True)

# --------------------------------------------------------------------------------------------------
# one step


@dataclass
class Run:
    """A training run: its settings, its models, and how far it is."""
    config: SimpleNamespace
    target: torch.nn.Module
    drafter: DFlashDraftModel
    wrapped_drafter: torch.nn.Module    # DDP around the drafter; without DDP the drafter itself
    optimizer: torch.optim.Optimizer
    micro_batches: MicroBatches
    total_steps: int
    step: int = 0
    guard: GradientGuard = field(default_factory=GradientGuard)

    # fast/training.py replaces these and target_features() with faster functions
    new_attend: Callable = masked_attend    # the drafter's attention
    chunk_loss: Callable = chunk_loss

    @torch.no_grad()
    def target_features(self, tokens):
        """Features (B, T, ...) of tokens (B, T), valid until the next call."""
        layer_ids = self.drafter.target_layer_ids
        features, _ = self.target(tokens, target_layer_ids=layer_ids, features_only=True)
        return features


def micro_batch_loss(run, tokens, supervised, generator, module):
    """The loss of a micro-batch, summed over its blocks, and its BlockSums.

    module: the drafter, or the wrapped drafter, whose backward exchanges gradients.
    """
    config = run.config
    drafter = run.drafter

    # blocks at random positions of the responses, the tokens that they should guess, and the
    # weight of each guess
    anchors, is_valid = sample_anchors(supervised, config.num_anchors, generator, config.max_length)
    labels, weights = block_labels(
        tokens, supervised, anchors, is_valid, K=drafter.block_size, gamma=config.gamma)
    in_response = weights > 0  # all that D-PACE needs of these weights

    # the frozen target reads the samples
    features = run.target_features(tokens)

    # the drafter processes all blocks at once; its weights are float32, its matmuls of type dtype
    anchor_tokens = tokens.gather(1, anchors)
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=config.dtype == "bfloat16"):
        embedded = drafter.embed_block(anchor_tokens, run.target.embed_tokens.weight)
        hidden = module(features, embedded, anchors, run.new_attend)

    # the target's head and the loss, in one pass that also computes the gradient of `hidden`
    chunk_loss_function = run.chunk_loss
    if config.weighting == "dpace":
        chunk_loss_function = functools.partial(run.chunk_loss, dpace_smoothing=DPACE_SMOOTHING)
    loss, _, correct, used_weights = block_loss(
        hidden, run.target.head_weight, Targets(labels, weights),
        chunk_loss_function=chunk_loss_function)

    # for the log
    operations = training_operations(drafter, run.target, *tokens.shape, anchors.shape[1])
    sums = block_sums(
        loss, used_weights, correct, in_response, tokens=tokens.numel(), operations=operations)
    return loss, sums


def train_step(run):
    """One optimizer step. Returns its entry in the log and its BlockSums.

    Losses, gradients, and the weights of guesses are summed over micro-batches and processes. Then
    we divide once by the sum of the weights. So the result does not depend on how samples were
    split, up to rounding.
    """
    config = run.config
    sums = add_up_gradients(run)

    # Divide the sums by the weight. DDP and FSDP averaged the gradients, so multiply by the number
    # of processes. If all samples of a step were cut before their answer, the weight is 0, and the
    # clamp avoids 0 / 0.
    factor = world_size() / sums.weight.clamp(min=1e-9)
    for parameter in run.drafter.parameters():
        parameter.grad *= factor.to(parameter.dtype)
    grad_norm = torch.nn.utils.clip_grad_norm_(run.drafter.parameters(), config.grad_clip)

    # So far everything was queued on the GPU. Here the CPU waits once, to read the norm
    # before clipping and the figures for the log.
    grad_norm = gather_full(grad_norm).item()
    sums = BlockSums(*[x.cpu() for x in sums])

    # the step itself, unless its gradient spikes
    lr = learning_rate(run.step, run.total_steps, config)
    in_warmup = run.step < config.warmup * run.total_steps
    if not run.guard.skips(grad_norm, in_warmup):
        for group in run.optimizer.param_groups:
            group["lr"] = lr
        run.optimizer.step()
    run.optimizer.zero_grad(set_to_none=True)
    if run.guard.must_stop():
        raise ValueError(why_stopped(run, grad_norm))
    run.step += 1

    entry = {"lr": lr, **figures(sums), "grad_norm": grad_norm, "skipped": run.guard.skipped}
    return entry, sums


def add_up_gradients(run):
    """Forward and backward of this process's micro-batches; BlockSums of all processes.

    Each micro-batch of the run has a number, and the processes take the numbers in turn.
    """
    config = run.config
    parts = []
    for micro in range(config.grad_accum_steps):
        number = (run.step * config.grad_accum_steps + micro) * world_size() + rank()
        mixed = np.random.SeedSequence((config.seed, number)).generate_state(1)[0]
        generator = torch.Generator().manual_seed(int(mixed))  # draws the anchors
        tokens, supervised = run.micro_batches[number]
        is_last = micro == config.grad_accum_steps - 1
        with gradient_exchange(run.wrapped_drafter, is_last):
            loss, micro_sums = micro_batch_loss(
                run, tokens, supervised, generator, run.wrapped_drafter)
            loss.backward()
        parts.append(micro_sums)
    return BlockSums(*[sum_over_ranks(x) for x in add_up(parts)])


def learning_rate(step, total_steps, config):
    """Linear warm-up, then a cosine to zero."""
    warmup_steps = max(1, round(config.warmup * total_steps))
    if step < warmup_steps:
        return config.lr * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * progress))


def evaluate(run, samples):
    """Loss and acceptance on held-out samples, with the same anchors every time, in every process.

    It can overestimate the acceptance: anchors are random here, but in decoding most of them follow
    a guess that failed, and such places are harder. It underestimates near the end of a response,
    where positions after the end count as wrong.

    Batch size and grad mode are the same as in training, because other ones would need another
    compilation. So samples that do not fill a batch are left out, unless no batch would be left.
    """
    batch_size = run.config.batch_size
    count = min(EVAL_SAMPLES, len(samples))
    parts = []
    for first in range(0, max(1, count - batch_size + 1), batch_size):
        end = min(first + batch_size, count)
        tokens, supervised = pad([samples[i] for i in range(first, end)], run.config)
        generator = torch.Generator().manual_seed(first)
        _, batch_sums = micro_batch_loss(run, tokens, supervised, generator, run.drafter)
        parts.append(batch_sums)
    return figures(add_up(parts))

# --------------------------------------------------------------------------------------------------
# the loop


def loop(run, held_out):
    """Train up to run.total_steps; returns the folder of the last checkpoint.

    After SIGTERM or Ctrl-C every process ends its step. Then the run saves a checkpoint and raises
    SystemExit with the command that resumes it.
    """
    config = run.config
    folder = newest_checkpoint(config.out_dir)  # the result if no step is left
    log = TrainingLog(run)
    is_stopped = False
    with stop_signals() as received:
        try:
            while run.step < run.total_steps and not is_stopped:
                entry, sums = train_step(run)
                log.count(sums)
                # a signal reaches the processes at different times, so they ask each other
                is_stopped = any_rank_received(received, config.device)
                is_end = run.step == run.total_steps
                if config.log_every and (run.step % config.log_every == 0 or is_end):
                    log.training(run, entry)
                if config.eval_every and (run.step % config.eval_every == 0 or is_end):
                    log.held_out(run, evaluate(run, held_out))
                is_save = config.save_every and run.step % config.save_every == 0
                if is_save or is_end or is_stopped:
                    folder = save_checkpoint(run)
        finally:
            log.close()  # also after an error, because the plot shows what led to it
    if is_stopped and run.step < run.total_steps:
        raise SystemExit(how_to_resume(run.step, folder) if rank() == 0 else 1)
    return folder

# --------------------------------------------------------------------------------------------------
# the command


def setup(config):
    """(run, held-out samples, stop ids), new or from a checkpoint."""
    check_config(config)  # all checks come before anything large is loaded
    checkpoint = checkpoint_to_resume(config)
    deterministic_kernels()
    tokenizer = None  # random:... targets measure speed and have none
    stops = set()
    if not config.target.startswith("random:"):
        tokenizer = load_tokenizer(config.target)
        stops = stop_ids(tokenizer)
    target_config, _ = read_target_config(config.target)
    drafter = new_drafter(config, target_config, tokenizer)
    start_wandb(config)
    prepare_data(config)
    samples = load_samples(config, "train", target_config.vocab_size)
    held_out = load_samples(config, "val", target_config.vocab_size)

    # Load a saved drafter's weights before it is sharded. Its moments are loaded after that.
    saved = None
    if checkpoint is not None:
        saved = load_training_state(checkpoint, drafter, target_config, config)
    target = load_target(config.target, config.device, config.dtype)
    run = new_run(config, target, drafter, samples)
    if saved is not None:
        load_moments(run.optimizer, saved.moments)
        run.step = saved.step
        run.guard = saved.guard
    return run, held_out, stops


def new_run(config, target, drafter, samples):
    """A Run at step 0 from loaded models and samples."""
    micro_batches = MicroBatches(samples, config)
    micro_batches_per_step = config.grad_accum_steps * world_size()
    total_steps = int(config.epochs * micro_batches.per_epoch) // micro_batches_per_step
    if total_steps < 1:
        raise ValueError(
            f"{len(samples)} samples are too few for a step of {config.batch_size} x "
            f"{micro_batches_per_step} samples: lower batch_size or raise epochs")
    wrapped_drafter = distribute(target, drafter, config.parallel, config.device)
    optimizer = new_optimizer(
        config.optimizer, drafter.parameters(), config.lr, config.betas, config.weight_decay)
    run = Run(config, target, drafter, wrapped_drafter, optimizer, micro_batches, total_steps)
    prepare_for_training(run)
    return run


def decode_held_out(config, folder, samples, stops):
    """(tau, prompts) of greedy decoding on held-out prompts. tau is tokens of rounds over rounds.

    It loads the target again, because the target of the run can be sharded or compiled.
    """
    target = load_target(config.target, config.device, config.dtype)
    drafter = load_drafter(folder, target.config, config.device, config.dtype)
    prepare_for_decoding(target, drafter)
    longest = target.config.max_position_embeddings - max(16, drafter.block_size) - 1
    prompts = []
    for i in range(min(config.decode_prompts, len(samples))):
        tokens, mask = samples[i]
        length = int(mask.argmax())  # up to the first response
        if 0 < length <= longest:
            prompts.append(tokens[:length].tolist())
        else:
            print(f"held-out prompt {i} has {length} tokens, not 1 to {longest}: skipped")
    outputs = generate_many(
        target, drafter, prompts, max_new_tokens=DECODE_TOKENS, slots=DECODE_SLOTS,
        stop_token_ids=stops)
    lengths = [len(output.tokens) for _, output in outputs]
    # the first output of each answer is the one token of its prefill, which is no round
    rounds = len(lengths) - len(prompts)
    tau = (sum(lengths) - len(prompts)) / rounds if rounds else math.nan
    return tau, len(prompts)


def train(config):
    """Set up, train, decode held-out prompts with the result, and print a summary."""
    join_processes(config.device)
    run, held_out, stops = setup(config)
    drafter_size = sum(p.numel() for p in run.drafter.parameters())
    target_size = sum(p.numel() for p in run.target.parameters())
    print(f"training a drafter of {drafter_size:,} parameters for a frozen target of "
          f"{target_size:,} | {len(run.micro_batches.samples):,} samples, {run.total_steps:,} "
          f"steps on {world_size()} x {config.device}", flush=True)
    if config.compile:
        warm_up(run, micro_batch_loss)
    folder = loop(run, held_out)

    # process 0 decodes with the result
    is_first = rank() == 0
    leave_processes()
    if not is_first:
        return
    del run  # frees its memory
    tau, prompts = decode_held_out(config, folder, held_out, stops)
    print(printable(f"wrote {folder} and {config.out_dir}/training.png"))
    print(f"held-out tau from real decoding: {tau:.3f} ({prompts} prompts)")
    print(how_to_use(config, folder))


def main(argv=None):
    if int(os.environ.get("RANK", 0)) > 0:
        sys.stdout = open(os.devnull, "w")  # only process 0 prints; errors go to stderr everywhere
    survive_closed_output()
    config = configure(globals(), argv)
    try:
        train(config)
    except (ValueError, OSError) as error:  # OSError: out_dir cannot be written
        sys.exit(one_line(f"error: {error}", LINE))
    except RuntimeError as error:
        if not is_lost_process(error):
            raise
        sys.exit(f"error: process {rank()} lost contact with another process; see the error of "
                 "that process. Continue with --resume")
    except KeyboardInterrupt:
        sys.exit("interrupted outside of the training steps. If there is a checkpoint, --resume "
                 "continues from it")


if __name__ == "__main__":
    main()
