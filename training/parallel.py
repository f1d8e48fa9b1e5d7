"""
Several processes, one per GPU, started by torchrun. With one process these functions do nothing or
the obvious.

DDP keeps a copy of the drafter in every process and averages the gradients during the backward.
FSDP also splits the weights of both models and gathers each layer when it runs.
"""
import contextlib
import os

import torch
import torch.distributed as dist
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel


def join_processes(device):
    """Join the processes of torchrun, if it started this one."""
    if "RANK" not in os.environ:
        return
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if device == "cuda" else "gloo")


def leave_processes():
    if dist.is_initialized():
        dist.destroy_process_group()


def is_lost_process(error):
    """Whether NCCL or gloo raised this error because another process has ended."""
    if isinstance(error, dist.DistBackendError):
        return True
    return "closed by peer" in str(error) or "reset by peer" in str(error)


def rank():
    """The number of this process; process 0 prints and writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    """The number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def wait_for_all():
    if dist.is_initialized():
        dist.barrier()


def sum_over_ranks(x):
    """The sum of a tensor over all processes, in place."""
    if dist.is_initialized():
        dist.all_reduce(x)
    return x


def peak_memory(device):
    """Peak gigabytes of tensors in each process; None on CPUs."""
    if device != "cuda":
        return None
    gigabytes = torch.zeros(world_size(), dtype=torch.float64, device=device)
    gigabytes[rank()] = torch.cuda.max_memory_allocated() / 1e9
    return sum_over_ranks(gigabytes).tolist()


def gather_full(x):
    """A tensor gathered from its shards, if it has any. Every process must call it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def shard_like(x, parameter):
    """A whole tensor, sharded like the parameter."""
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
        # Dynamo would split compiled code at DDP's buckets to send gradients early. Each layer is
        # compiled by itself, so its gradients are sent as soon as its backward has run.
        torch._dynamo.config.optimize_ddp = False
        return DistributedDataParallel(
            drafter, broadcast_buffers=False, gradient_as_bucket_view=True)

    # The target's embedding and head stay whole, because every loss needs all of their rows.
    in_layers = set(target.layers.parameters())
    stays_whole = {p for p in target.parameters() if p not in in_layers}

    # reshard_after_forward: an evaluation has no backward. Weights that stayed gathered would be
    # stale after the next optimizer step.
    mesh = dist.init_device_mesh(device, (world_size(),))
    for module, ignored in ((target, stays_whole), (drafter, None)):
        for layer in module.layers:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True)
        fully_shard(module, mesh=mesh, reshard_after_forward=True, ignored_params=ignored)
    return drafter


def gradient_exchange(net, is_last):
    """A context for forward and backward of one micro-batch.

    Gradients are exchanged only in the last micro-batch of a step. Before, they add up locally.
    """
    if isinstance(net, FSDPModule):
        net.set_requires_gradient_sync(is_last)
    if isinstance(net, DistributedDataParallel) and not is_last:
        return net.no_sync()
    return contextlib.nullcontext()
