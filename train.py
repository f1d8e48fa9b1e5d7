"""
Trains a DFlash drafter for a frozen target, online: the target makes the features, the drafter learns from them.

    python train.py config/nano.py                           # the shipped nano pair, two CPU cores, minutes
    python train.py config/nano.py --resume                  # go on after an interruption
    torchrun --standalone --nproc_per_node=8 train.py config/nano.py       # one node of 8; DDP, or --parallel=fsdp
    torchrun --nnodes=2 --nproc_per_node=8 --rdzv_backend=c10d --rdzv_endpoint=HOST:PORT train.py ...  # on each node

The defaults below are the recipe of Phase 1.2; a config file holds what another run changes. A checkpoint is a folder
out_dir/step-000123 that engines load; beside it stand log.jsonl, and loss, tau and acceptance as a picture. Rank 0
writes it, whole; nodes share the file system that out_dir is on. A step is batch_size x accumulation x ranks rows.
"""
import argparse
import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, field

import numpy as np
import torch
import torch._inductor.config as inductor
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel
from torch.utils._pytree import tree_map

import plots
from configurator import configure
from data.rows import Rows
from draft_decode import run as decode
from model import (DFlashDraftModel, block_labels, block_loss, drafter_config, head_chunk, load_drafter, newest,
                   sample_anchors, save_drafter)
from target import fingerprint, load_target, load_tokenizer, stop_ids

# what
target = "Qwen/Qwen3.5-0.8B"                # folder of the frozen target
data = "data/math240k"                      # folder of rows; its prepare.py is run when they are missing
out_dir = "out/phase1_2-dflash"             # checkpoints; engines know the method by "dflash" in the path
resume = False                              # go on from the newest checkpoint in out_dir
start: str | None = None                    # folder of a SpecForge checkpoint to go on from, with its training_state.pt
# the drafter
layers = 5                                  # of it
heads = 8                                   # of attention
kv_heads = 2                                # of attention's keys and values
head_dim = 256                              # of a head, channels
mlp = 3584                                  # channels of the SwiGLU
taps = (3, 7, 11, 15, 19)                   # target layers whose outputs are the features
block_size = 16                             # K: the anchor and K - 1 guesses
mask_token_id: int | None = None            # id of the mask; None: the first after the tokenizer
# the loss
anchors = 512                               # blocks of a row
loss = "decay"                              # weights of slots: decay, or dpace, by the drafter's own confidence
gamma = 7.0                                 # slots over which decay's weight falls to 1/e
smooth = 0.5                                # D-PACE's a, of 0 .. 1; 1 weighs slots by their distance to the end
head_rows = 1024                            # rows of logits that exist at once
# optimisation
batch_size = 2                              # rows of a micro-batch
accumulation = 2                            # micro-batches of a step
max_length = 3072                           # tokens of a row; longer ones are cut
length_step = 512                           # padded lengths are multiples of it: few shapes, so few compilations
bucket = 64                                 # micro-batches sorted by length together: less padding, less mixing
epochs = 1.0                                # passes over the rows
lr = 3e-4                                   # peak of the learning rate
warmup = 0.04                               # share of the steps up to it; then a cosine to zero
betas = (0.9, 0.999)                        # of AdamW
weight_decay = 0.0                          # of AdamW
clip = 1.0                                  # norm of the gradient at most
spike = 10.0                                # after warm-up, a norm so many times the usual one: the step is skipped
patience = 5                                # skipped steps in a row that end the run
seed = 0                                    # of weights, row order and anchors
# sight
log_every = 10                              # steps
eval_every = 500                            # steps between estimates on held-out rows
eval_rows = 64                              # held-out rows of an estimate
save_every = 1000                           # steps between checkpoints
keep = 3                                    # newest checkpoints that are kept
wandb_project: str | None = None            # Weights & Biases project to log to; None: wandb is not even imported
decode_rows = 64                            # held-out prompts really decoded at the end
decode_tokens = 512                         # new tokens of each at most
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of the target and of products; weights and moments are fp32
attention = "flex" if device == "cuda" else "grouped"    # of the drafter; grouped suits CPUs, both run on GPUs
compile = False                             # torch.compile target and drafter; takes minutes at the start
parallel = "ddp"                            # under torchrun: ddp, or fsdp, which also shards the frozen target

# ----------------------------------------------------------------------------------------------------------------------
# ranks: one process, or those of torchrun


def ranks():
    """(this process's rank, how many there are)."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def join():
    """Join the processes that torchrun started. A rank that dies makes the next exchange of the others fail, and
    torchrun ends them all with a non-zero status."""
    if "RANK" in os.environ:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if device == "cuda" else "gloo")


def barrier():
    if dist.is_initialized():
        dist.barrier()


def summed(x):
    """The sum of a tensor over ranks."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def whole(x):
    """A tensor gathered from its shards, if it has any; every rank must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def distribute(model, drafter):
    """The module whose forward trains the drafter. DDP exchanges gradients during the last backward, which a sum by
    hand could not hide. Both ways average over ranks; train_step turns the mean into the sum it needs.

    FSDP shards the layers of both models and what else the drafter has. Embedding and head of the target stay whole:
    the loss needs all of their rows in every step. reshard_after_forward: estimates forward without a backward, and
    would leave gathered weights behind that the next optimizer step makes stale.
    """
    if not dist.is_initialized():
        if parallel == "fsdp":
            raise ValueError("parallel = 'fsdp' shards over processes: start it with torchrun")
        return drafter
    if parallel == "ddp":
        return DistributedDataParallel(drafter, broadcast_buffers=False, gradient_as_bucket_view=True)
    for layer in model.modules():
        if hasattr(layer, "joined"):
            layer.joined = layer.packed = None  # one tensor of several weights would stay whole on every rank
    mesh = dist.init_device_mesh(device, (ranks()[1],))
    inside = {p for layer in model.layers for p in layer.parameters()}
    for module, ignored in ((model, {p for p in model.parameters() if p not in inside}), (drafter, None)):
        for layer in module.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    return drafter


def exchanging(net, last):
    """A context for a backward pass that exchanges gradients with the other ranks only if it is the step's last."""
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(last)
    return net.no_sync() if isinstance(net, DistributedDataParallel) and not last else contextlib.nullcontext()

# ----------------------------------------------------------------------------------------------------------------------
# data: a batch is a pure function of (seed, step, rank), so a resumed run needs no loader state


class Batches:
    """Micro-batches (tokens, supervised) of rows alike in length, so that little is padding. They are numbered over
    the whole run, and number n depends on the seed and n alone: ranks and accumulation only share them out."""
    def __init__(self, rows):
        self.rows, self.order = rows, (None, None)
        self.lengths = np.array([len(t) for t, _ in rows])

    def __len__(self):
        """Micro-batches of an epoch; the few rows too many for whole ones are others in each."""
        return len(self.rows) // batch_size

    def chosen(self, n):
        """The numbers of the rows of micro-batch n."""
        epoch, place = divmod(n, len(self))
        if self.order[0] != epoch:
            self.order = epoch, self.shuffled(epoch)
        return self.order[1][place]

    def shuffled(self, epoch):
        """(micro-batches, batch_size): shuffled rows, sorted by length in windows of `bucket` batches; then whole
        batches are shuffled, as a run that saw short rows first would learn another distribution than the data's."""
        r = np.random.default_rng((seed, epoch))
        rows = r.permutation(len(self.rows))[:len(self) * batch_size]
        for part in np.split(rows, range(bucket * batch_size, len(rows), bucket * batch_size)):
            part[:] = part[np.argsort(self.lengths[part], kind="stable")]  # a view of rows
        return r.permutation(rows.reshape(-1, batch_size))

    def __getitem__(self, n):
        return pad([self.rows[i] for i in self.chosen(n)])


def pad(chosen):
    """(tokens, supervised) on the device from a list of rows; padding is unsupervised and, being last, unseen."""
    T = -(-min(max_length, max(len(t) for t, _ in chosen)) // length_step) * length_step
    tokens, mask = torch.zeros(len(chosen), T, dtype=torch.long), torch.zeros(len(chosen), T, dtype=torch.bool)
    for i, (t, m) in enumerate(chosen):
        n = min(len(t), max_length)
        tokens[i, :n], mask[i, :n] = torch.from_numpy(t[:n]), torch.from_numpy(m[:n] > 0)
    return tokens.to(device), mask.to(device)


def ensure_data(folder):
    """Run the folder's own prepare.py when its output is missing; one rank does, the others wait."""
    script = os.path.join(folder, "prepare.py")
    if ranks()[0] == 0 and not os.path.exists(os.path.join(folder, "meta.json")) and os.path.exists(script):
        print(f"{folder} has no rows yet: running {script}", flush=True)
        if subprocess.run([sys.executable, script, f"--target={target}"]).returncode:
            raise ValueError(f"{script} failed; its message stands above")
    barrier()

# ----------------------------------------------------------------------------------------------------------------------
# one step


@dataclass
class Run:
    """A run: the models, `net`, which is the drafter as its ranks train it, and where the run stands. watch: the usual
    norm of the gradient, steps skipped, and skipped in a row; saved, as a resumed run must skip the same steps."""
    model: torch.nn.Module
    drafter: DFlashDraftModel
    net: torch.nn.Module
    optimizer: torch.optim.Optimizer
    batches: Batches
    steps: int
    step: int = 0
    watch: dict = field(default_factory=lambda: {"norm": 0.0, "skipped": 0, "row": 0})


compiled_chunk = torch.compile(head_chunk, dynamic=False)  # nothing is compiled before it is called


def block_forward(model, net, tokens, supervised, generator):
    """The loss summed over the batch's blocks, and sums (5 + 2 (K-1),) in fp64: of the loss, of its weights, blocks,
    tokens with padding, operations, and by slot: blocks accepted up to it, and blocks that reach it."""
    drafter, embedding = getattr(net, "module", net), model.embed_tokens.weight
    with torch.no_grad():
        features, _ = model(tokens, taps=drafter.taps)
    at, real = sample_anchors(supervised, anchors, generator)
    labels, weights = block_labels(tokens, supervised, at, real, drafter.block_size,
                                   gamma if loss == "decay" else math.inf)
    inside = weights > 0
    with torch.autocast(tokens.device.type, torch.bfloat16, enabled=dtype == "bfloat16"):
        hidden = net(features, drafter.block(tokens.gather(1, at), embedding), at, attention == "flex")
    total, _, correct, weights = block_loss(hidden, model.head, labels, weights, head_rows,
                                            smooth if loss == "dpace" else None,
                                            compiled_chunk if compile else head_chunk)
    count = tokens.new_tensor((tokens.numel(), operations(drafter, *tokens.shape, anchors, model)))
    prefix = (correct & inside).long().cumprod(-1)
    return total, torch.cat((torch.stack((total.detach(), weights.sum())), real.sum()[None], count,
                             prefix.sum((0, 1)), inside.sum((0, 1)))).double()


def operations(drafter, B, T, A, model=None):
    """Operations of a training step of B rows of T tokens with A anchors, two for each multiply-add; with the target's
    forward if it is given. A matrix costs 2 a row forward and 4 backward, 2 if its input needs no gradient."""
    def size(*modules):
        return sum(p.numel() for module in modules for p in module.parameters())
    c, K = drafter.config, drafter.block_size
    rows, width = A * K, c.num_hidden_layers * c.num_attention_heads * c.head_dim
    keys = [proj for layer in drafter.layers for proj in (layer.self_attn.k_proj, layer.self_attn.v_proj)]
    of_drafter = 6 * size(drafter.layers) * rows + 6 * size(*keys) * T + 4 * size(drafter.fc) * T
    of_attention = 12 * width * rows * (T / 2 + K)          # two products forward, four backward, half of the context
    of_head = 4 * c.vocab_size * c.hidden_size * A * (K - 1)  # logits, and the gradient by their input
    of_target = 2 * size(*model.layers[:max(drafter.taps) + 1]) * T if model else 0
    return int(B * (of_drafter + of_attention + of_head + of_target))


def acceptance(sums):
    """Estimated tau, and the share of blocks accepted up to each slot (K-1,), among those that reach it."""
    prefix, inside = sums[5:].chunk(2)
    return 1 + (prefix.sum() / sums[2].clamp(min=1)).item(), (prefix / inside.clamp(min=1)).tolist()


def estimate(model, drafter, rows):
    """(loss, tau, slots) on held-out rows with anchors that are the same every time. tau is 1 + the mean sum of prefix
    products, never an accuracy. Its anchors are random, those of decoding stand where a guess just failed: it reads
    high, by a tenth on the nano pair. Whole batches, and gradients on: other shapes or modes would compile again."""
    total, count = 0, min(eval_rows, len(rows))
    for i in range(0, max(1, count - batch_size + 1), batch_size):
        tokens, supervised = pad([rows[j] for j in range(i, min(i + batch_size, count))])
        total = total + block_forward(model, drafter, tokens, supervised, torch.Generator().manual_seed(i))[1]
    return (total[0] / total[1].clamp(min=1e-9)).item(), *acceptance(total)


def rate(step, steps):
    """Learning rate of a step: linear warm-up, then a cosine to zero."""
    first = max(1, round(warmup * steps))
    if step < first:
        return lr * (step + 1) / first
    return lr * 0.5 * (1 + math.cos(math.pi * (step - first) / max(1, steps - first)))


def train_step(run):
    """One optimizer step. Loss, gradients and weights are summed over micro-batches and ranks and divided once, so
    that the split does not matter. Returns what is logged, tokens and operations. A step whose gradient is not finite
    or far longer than usual changes nothing; ValueError after `patience` of them in a row."""
    (rank, world), total, watch = ranks(), 0, run.watch
    numbers = [(run.step * accumulation + micro) * world + rank for micro in range(accumulation)]
    for n in numbers:
        generator = torch.Generator().manual_seed(int(np.random.SeedSequence((seed, n)).generate_state(1)[0]))
        with exchanging(run.net, n == numbers[-1]):
            part, sums = block_forward(run.model, run.net, *run.batches[n], generator)
            part.backward()
        total = total + sums
    total = summed(total)
    weight = total[1].clamp(min=1e-9)  # rows cut before their answer give a step without loss, and then no gradient
    for p in run.drafter.parameters():
        p.grad *= (world / weight).to(p.dtype)  # from the mean over ranks, which is what they exchanged, to the sum
    norm = whole(torch.nn.utils.clip_grad_norm_(run.drafter.parameters(), clip)).item()
    strange = watch["norm"] and run.step >= warmup * run.steps and norm > spike * watch["norm"]
    if math.isfinite(norm) and not strange:
        for group in run.optimizer.param_groups:
            group["lr"] = rate(run.step, run.steps)
        run.optimizer.step()
        watch["norm"], watch["row"] = 0.98 * (watch["norm"] or norm) + 0.02 * norm, 0
    else:
        watch["skipped"], watch["row"] = watch["skipped"] + 1, watch["row"] + 1
    run.optimizer.zero_grad(set_to_none=True)
    if watch["row"] == patience:
        first = run.step * accumulation * world
        rows = np.concatenate([run.batches.chosen(first + i) for i in range(accumulation * world)]).tolist()
        raise ValueError(f"the gradient of step {run.step + 1} has norm {norm:.3g}, usual is {watch['norm']:.3g}, and "
                         f"it is the {patience}th in a row: look at rows {rows} of {data} (split train), or lower lr")
    run.step += 1
    tau, slots = acceptance(total)
    return {"loss": (total[0] / weight).item(), "norm": norm, "tau": tau, "slots": slots,
            "skipped": watch["skipped"]}, total[3].item(), total[4].item()

# ----------------------------------------------------------------------------------------------------------------------
# checkpoints


def save(run, config):
    """out_dir/step-NNNNNN: what engines load, and training_state.pt in SpecForge's layout, with fp32 weights added,
    as a run resumed from the bf16 ones would not be the same run. The same files whatever the number of ranks."""
    folder = os.path.join(out_dir, f"step-{run.step:06d}")
    weights, moments = tree_map(lambda x: whole(x).cpu() if isinstance(x, torch.Tensor) else x,
                                (run.drafter.state_dict(), run.optimizer.state_dict()))
    if ranks()[0] == 0 and not os.path.isdir(folder):  # a folder of that name is whole, and of this very step
        state = {"epoch": 0, "global_step": run.step, "args": argparse.Namespace(**config, ranks=ranks()[1]),
                 "optimizer_state_dict": moments, "scheduler_state_dict": {"last_epoch": run.step},
                 "master_weights": weights, "watch": run.watch}
        card = (f"# DFlash drafter for {os.path.basename(os.path.normpath(target))}\n\nBlock-diffusion speculative "
                f"decoding (arXiv 2602.06036): {layers} layers, blocks of {block_size}, features of target layers "
                f"{list(taps)}.\nStep {run.step} of {run.steps}; data: {os.path.basename(os.path.normpath(data))}.\n")
        with torch.device("meta"):
            plain = DFlashDraftModel(run.drafter.config)
        plain.load_state_dict(weights, assign=True)
        try:
            save_drafter(plain, folder, card, {"training_state.pt": state})
        except Exception as error:  # a full disk: OSError, or types of torch's and safetensors' own
            free = shutil.disk_usage(out_dir).free / 1e6
            shutil.rmtree(folder + ".part", ignore_errors=True)
            raise ValueError(f"cannot write {folder}, its disk has {free:.1f} MB left ({' '.join(str(error).split())}):"
                             " make room; what was saved before is untouched, --resume goes on from it") from None
        prune()
    barrier()
    return folder


def prune():
    """Delete all but the newest checkpoints, and what interrupted saves left. A folder is renamed first: half of it
    would look like a checkpoint."""
    steps = sorted(name for name in os.listdir(out_dir) if name.startswith("step-") and not name.endswith(".part"))
    for name in steps[:-keep]:
        os.replace(os.path.join(out_dir, name), os.path.join(out_dir, name + ".part"))
    for name in os.listdir(out_dir):
        if name.startswith("step-") and name.endswith(".part"):
            shutil.rmtree(os.path.join(out_dir, name))


FREE = ("resume", "start", "out_dir", "log_every", "eval_every", "eval_rows", "save_every", "keep", "decode_rows",
        "decode_tokens", "wandb_project", "device", "head_rows", "length_step", "attention", "compile", "parallel",
        "accumulation", "ranks")  # keys that a resumed run may change and still be the same run


def load_state(folder, drafter, model, config):
    """Put a checkpoint's weights into the drafter; returns its moments, its step and its watch, None if it has none.

    A checkpoint of SpecForge's holds no fp32 weights, so the folder's bf16 ones are taken; its global_step counts
    micro-batches, AdamW's own step the steps. Only tensors and a Namespace are unpickled. ValueError when the
    checkpoint is broken, does not fit, or the run was another one: other rows, anchors or rates, without a word.
    """
    path = os.path.join(folder, "training_state.pt")
    if not os.path.isfile(path):
        raise ValueError(f"{folder} has no training_state.pt, so no run can go on from it")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            state = torch.load(path, map_location="cpu", weights_only=True)
        moments, before = state["optimizer_state_dict"]["state"], vars(state["args"])
        step = int(moments[0]["step"]) if "master_weights" not in state else state["global_step"]
    except Exception as error:  # torch and pickle raise many types for a broken or a foreign file
        raise ValueError(f"cannot read {path}: {' '.join(str(error).split())}") from None
    if "master_weights" in state:
        other = [f"{k} was {before[k]!r}, is {v!r}" for k, v in config.items()
                 if k not in FREE and before.get(k, v) != v]
        was, now = before.get("accumulation", 1) * before.get("ranks", 1), accumulation * ranks()[1]
        if was != now:
            other.append(f"accumulation x ranks was {was}, is {now}")
        if other:
            raise ValueError(f"{folder} is of another run, --resume cannot go on with it: {'; '.join(other)}")
    else:
        loaded = load_drafter(folder, model.config)
        if loaded.config.dflash_config != drafter.config.dflash_config:
            raise ValueError(f"{folder} has {loaded.config.dflash_config}, this run {drafter.config.dflash_config}")
    try:
        drafter.load_state_dict(state.get("master_weights") or loaded.state_dict())
        for i, p in enumerate(drafter.parameters()):
            assert moments[i]["exp_avg"].shape == p.shape, f"moment {i} is {moments[i]['exp_avg'].shape}, not {p.shape}"
    except (RuntimeError, AssertionError, KeyError) as error:
        raise ValueError(f"{folder} does not fit this drafter: {' '.join(str(error).split())}") from None
    return moments, step, state.get("watch")


def load_moments(optimizer, moments):
    """Put moments, indexed in module order, into an optimizer whose parameters may be sharded; its settings stay."""
    params = [p for group in optimizer.param_groups for p in group["params"]]
    state = {i: {k: distribute_tensor(v, p.device_mesh, p.placements, src_data_rank=None)
                 if isinstance(p, DTensor) and v.dim() else v for k, v in moments[i].items()}
             for i, p in enumerate(params)}
    optimizer.load_state_dict({"state": state, "param_groups": optimizer.state_dict()["param_groups"]})


def start_log(step):
    """log.jsonl for appending, without what an interrupted run wrote after the step it resumes from; for rank 0."""
    path = os.path.join(out_dir, "log.jsonl") if ranks()[0] == 0 else os.devnull
    lines = []
    if os.path.isfile(path):
        with open(path) as f:
            lines = [line for line in f if line.endswith("\n") and json.loads(line)["step"] <= step]
        with open(path + ".tmp", "w") as f:
            f.writelines(lines)
        os.replace(path + ".tmp", path)
    return open(path, "a", buffering=1)

# ----------------------------------------------------------------------------------------------------------------------
# the run

SHOWN = (1, 2, 4, 8, 15)  # slots whose acceptance is shown
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12, "RTX 4090": 165e12,
        "B200": 2250e12}  # dense bf16 operations a second, from data sheets; no MFU for what is not listed


def mfu(rate):
    """What share of the devices' peak `rate`, operations a second of all ranks, is; None where it is not known."""
    name = torch.cuda.get_device_name() if device == "cuda" and dtype == "bfloat16" else ""
    peak = next((peak for key, peak in PEAK.items() if key in name), None)
    return rate / (peak * ranks()[1]) if peak else None


def decode_held_out(folder, rows, stops):
    """tau (micro), all tokens over all rounds, of real greedy decoding on held-out prompts with a saved checkpoint; on
    one process, with a target of its own, as that of training may be sharded or compiled."""
    model = load_target(target, device, dtype)
    drafter, tokens, rounds, decoders = load_drafter(folder, model.config, device, dtype), 0, 0, {}
    for i in range(min(decode_rows, len(rows))):
        ids, mask = rows[i]
        _, result, _ = decode(model, drafter, ids[:int(mask.argmax())].tolist(), decode_tokens, stops,
                              decoders=decoders)
        tokens, rounds = tokens + sum(len(r.tokens) for r in result), rounds + len(result)
    return tokens / max(1, rounds)


def check():
    """ValueError for values of the configuration that no run can have."""
    for name, allowed in (("loss", ("decay", "dpace")), ("attention", ("flex", "grouped")),
                          ("parallel", ("ddp", "fsdp")), ("device", ("cpu", "cuda"))):
        if globals()[name] not in allowed:
            raise ValueError(f"{name} = {globals()[name]!r}: use {' or '.join(allowed)}")
    if attention == "flex" and device == "cpu":
        raise ValueError("attention = 'flex' has no backward on CPUs: use grouped")
    for name in ("keep", "batch_size", "accumulation", "anchors", "length_step", "patience"):
        if globals()[name] < 1:
            raise ValueError(f"{name} = {globals()[name]}: use 1 or more")


def repeatable():
    """Kernels chosen by rule and not by time, and none that sums in any order: a resumed run has to choose the same."""
    inductor.deterministic = True
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # which costs 5 % and changes no result here


def setup(config):
    """(run, held-out rows, stop ids): everything, from nothing or from a checkpoint."""
    check()
    repeatable()
    folder = newest(out_dir)
    if os.path.basename(folder).startswith("step-") and not resume:
        raise ValueError(f"{out_dir} holds a run ({os.path.basename(folder)}): --resume goes on with it, "
                         "--out_dir=... starts another")
    if resume and folder == out_dir:
        raise ValueError(f"nothing to resume: {out_dir} holds no step-* checkpoint")
    tokenizer = load_tokenizer(target)  # before the weights, as it fails sooner
    model = load_target(target, device, dtype)
    ensure_data(data)
    rows, held_out = (Rows(data, split, model.config.vocab_size, fingerprint(target)) for split in ("train", "val"))
    mask_id = len(tokenizer) if mask_token_id is None else mask_token_id
    if not 0 <= mask_id < model.config.vocab_size:
        raise ValueError(f"mask_token_id = {mask_id} is outside the target's vocabulary of {model.config.vocab_size}")
    torch.manual_seed(seed)
    drafter = DFlashDraftModel(drafter_config(model.config, layers, taps, mask_id, heads, kv_heads, head_dim, mlp,
                                              block_size)).to(device)
    before = load_state(folder if resume else start, drafter, model, config) if resume or start else None
    if compile:
        compile_layers(model, drafter)
    net, batches = distribute(model, drafter), Batches(rows)
    optimizer = torch.optim.AdamW(drafter.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
    run = Run(model, drafter, net, optimizer, batches,
              int(epochs * len(batches)) // (accumulation * ranks()[1]))
    if before:
        load_moments(optimizer, before[0])
        run.step, run.watch = before[1], before[2] or run.watch
    if run.steps < 1:
        raise ValueError(f"{len(rows)} rows make no step of {batch_size} x {accumulation * ranks()[1]} rows: lower "
                         "batch_size")
    return run, held_out, stop_ids(tokenizer)


def compile_layers(model, drafter):
    torch._dynamo.config.recompile_limit = 64  # one for each row length and kind of layer
    for layer in (*model.layers, *drafter.layers):
        layer.compile(dynamic=False)


def warm_up(run):
    """Compile every row length before the first step, so that none is met late."""
    for T in range(length_step, max_length + length_step, length_step):
        tokens = torch.zeros(batch_size, T, dtype=torch.long, device=device)
        block_forward(run.model, run.net, tokens, tokens == 0, torch.Generator())[0].backward()
        run.optimizer.zero_grad(set_to_none=True)


def report(log, kind, step, steps, entry, speed=None):
    """One line of log.jsonl, and one for the eye."""
    log.write(json.dumps({"kind": kind, "step": step, **entry, **(speed or {})}) + "\n")
    if wandb_project and ranks()[0] == 0:
        import wandb
        wandb.log({f"{kind}/{k}": v for k, v in entry.items() if k != "slots"}, step=step)
    line = f"step {step}/{steps} | "
    if kind == "train":
        line += (f"loss {entry['loss']:.4f} | tau {entry['tau']:.2f} | norm {entry['norm']:.2f} | "
                 f"lr {entry['lr']:.1e} | {speed['tokens_per_s']:,.0f} tokens/s | ")
        line += f"{speed['mfu']:.1%} MFU | " if speed["mfu"] else ""
        line += f"{entry['skipped']} skipped | " if entry["skipped"] else ""
        line += f"{speed['minutes_left']:.1f} min left"
    else:
        shown = " ".join(f"{k}:{entry['slots'][k - 1]:.2f}" for k in SHOWN if k <= len(entry["slots"]))
        line += f"held out: loss {entry['loss']:.4f} | tau {entry['tau']:.2f} | accepted up to slot {shown}"
    print(line, flush=True)


def loop(run, held_out, config):
    """Steps to run.steps, logged, estimated and saved; returns the last checkpoint's folder. SIGTERM and Ctrl-C let
    the step end on every rank, save, and leave by SystemExit with a line that says how to go on."""
    os.makedirs(out_dir, exist_ok=True)
    stop, folder, first, began, tokens, flops = [], newest(out_dir), run.step, time.time(), 0, 0
    before = {s: signal.signal(s, lambda number, _: stop.append(number)) for s in (signal.SIGTERM, signal.SIGINT)}
    log, steps, stopped = start_log(run.step), run.steps, False
    try:
        while run.step < steps and not stopped:
            lr_now = rate(run.step, steps)
            entry, count, work = train_step(run)
            step, tokens, flops = run.step, tokens + count, flops + work
            stopped = bool(summed(torch.tensor(len(stop), device=device)))  # ranks hear of it at different times
            end = stopped or step == steps
            if step % log_every == 0 or step == steps:
                seconds = time.time() - began
                report(log, "train", step, steps, {"lr": lr_now, **entry}, {
                    "tokens_per_s": tokens / seconds, "mfu": mfu(flops / seconds),
                    "minutes_left": (steps - step) * seconds / (step - first) / 60})
            if step % eval_every == 0 or step == steps:
                value, tau, slots = estimate(run.model, run.drafter, held_out)
                report(log, "val", step, steps, {"loss": value, "tau": tau, "slots": slots})
            if step % save_every == 0 or end:
                folder = save(run, config)
    finally:
        log.close()
        for number, handler in before.items():
            signal.signal(number, handler)
        if ranks()[0] == 0:
            with open(os.path.join(out_dir, "log.jsonl")) as f:
                plots.training(os.path.join(out_dir, "training.png"), [json.loads(line) for line in f], SHOWN)
    if stopped and run.step < steps:
        words = [word for word in sys.argv[1:] if word != "--resume"]
        how = "python" if ranks()[1] == 1 else "torchrun ..., as before,"
        raise SystemExit(f"stopped at step {run.step}, saved {folder}; to go on: {how} train.py "
                         f"{' '.join(words + ['--resume'])}" if ranks()[0] == 0 else 1)
    return folder


def main():
    if int(os.environ.get("RANK", 0)):
        sys.stdout = open(os.devnull, "w")  # only rank 0 speaks; errors go to stderr, whoever makes them
    config = configure(globals())
    try:
        join()
        run, held_out, stops = setup(config)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (run.drafter, run.model)]
        print(f"{sizes[0]:,} parameters to train for a target of {sizes[1]:,} | {len(run.batches.rows):,} rows, "
              f"{run.steps:,} steps on {ranks()[1]} x {device}", flush=True)
        if wandb_project and ranks()[0] == 0:
            import wandb
            wandb.init(project=wandb_project, name=os.path.basename(os.path.normpath(out_dir)), config=config)
        if compile:
            warm_up(run)
        folder, rank = loop(run, held_out, config), ranks()[0]
        if dist.is_initialized():
            dist.destroy_process_group()
        if rank:
            return
        del run
        tau = decode_held_out(folder, held_out, stops)
    except (ValueError, OSError) as error:  # OSError: out_dir cannot be written
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted while no step was under way: nothing is lost, --resume goes on from the last checkpoint")
    print(f"wrote {folder} and {out_dir}/training.png\n"
          f"try it: python draft_decode.py --target={target} --drafter={folder} --prompt \"...\"\n"
          f"held-out tau from real decoding: {tau:.3f} ({min(decode_rows, len(held_out))} prompts)")


if __name__ == "__main__":
    main()
