"""
What several processes need: one process a GPU, started by torchrun. With a single process every
function here does nothing, or the obvious.

DDP keeps a copy of the drafter in every process and averages gradients during the backward pass.
FSDP also splits the weights of both models over the processes and gathers a layer when it runs.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from fast.projections import unjoin_projections


def join_processes(device):
    """Join the processes that torchrun started, if it did.

    If one of them dies, torchrun ends the others on its node with a non-zero status: at once, or
    where they hang in NCCL, which waits for ever, 20 seconds later (training/interruption.py). NCCL's
    watchdog ends what no torchrun does, after 10 minutes.
    """
    if "RANK" not in os.environ:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def is_lost_process(error):
    """Whether an error came about because another process has ended: of NCCL, or of gloo."""
    if isinstance(error, dist.DistBackendError):
        return True
    text = str(error)
    return "Connection closed by peer" in text or "Connection reset by peer" in text


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def rank():
    """The number of this process; process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """How many processes there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def gather_numbers(number, device):
    """A number of every process, as a list by rank."""
    numbers = torch.zeros(world_size(), dtype=torch.float64, device=device)
    numbers[rank()] = number
    return sum_over_ranks(numbers).tolist()


def gather_full(x):
    """A tensor gathered from its shards, if it has any; every process must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, parameter):
    """A whole tensor split in the way that a parameter is, if it is."""
    if not isinstance(parameter, DTensor):
        return x
    return distribute_tensor(x, parameter.device_mesh, parameter.placements, src_data_rank=None)


def distribute(target, drafter, method, device):
    """The module whose forward and backward train the drafter; method is "ddp" or "fsdp"."""
    if not dist.is_initialized():
        if method == "fsdp":
            raise ValueError("parallel = 'fsdp' shards over processes: start it with torchrun")
        return drafter
    if method == "ddp":
        # Dynamo would cut what it compiles into pieces of DDP's buckets, to send gradients early. A
        # layer is compiled by itself, so its gradients are sent as soon as its backward has run.
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(
            drafter, broadcast_buffers=False, gradient_as_bucket_view=True)

    # tensors that join several weights would stay whole in every process
    unjoin_projections(target)

    # Embedding and head of the target stay whole: the loss needs all of their rows in every step.
    in_layers = set()
    for layer in target.layers:
        in_layers.update(layer.parameters())
    stays_whole = {p for p in target.parameters() if p not in in_layers}

    # reshard_after_forward: an estimate runs forward without a backward. Gathered weights that it
    # left behind would be stale after the next optimizer step.
    mesh = dist.init_device_mesh(device, (world_size(),))
    for module, ignored in ((target, stays_whole), (drafter, None)):
        for layer in module.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    return drafter


def gradient_exchange(net, is_last):
    """A context for forward and backward of one micro-batch.

    Gradients are exchanged in the last micro-batch of a step only; before, they add up locally.
    """
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(is_last)
    if isinstance(net, DistributedDataParallel) and not is_last:
        return net.no_sync()
    return contextlib.nullcontext()
