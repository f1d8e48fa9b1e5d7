"""
The numbers of a step: sums over blocks, which add up over micro-batches and processes.
"""
from typing import NamedTuple

import torch


class BlockSums(NamedTuple):
    """Sums over the blocks of a micro-batch, in float64."""
    loss: torch.Tensor
    weight: torch.Tensor
    right_up_to: torch.Tensor       # (K-1,) blocks whose guesses are right up to this position
    reached: torch.Tensor           # (K-1,) blocks whose response is long enough for this position
    tokens: torch.Tensor            # including padding
    operations: torch.Tensor


def block_sums(loss, weights, correct, in_response, *, tokens, operations):
    """BlockSums of a micro-batch; weights, correct, and in_response are (B, A, K-1)."""
    right_up_to = (correct & in_response).long().cumprod(-1)
    # torch.full lets the GPU write the number. Copying it to the GPU would make the CPU wait.
    return BlockSums(
        loss=loss.detach().double(),
        weight=weights.sum().double(),
        right_up_to=right_up_to.sum((0, 1)).double(),
        reached=in_response.sum((0, 1)).double(),
        tokens=torch.full((), tokens, dtype=torch.float64, device=loss.device),
        operations=torch.full((), operations, dtype=torch.float64, device=loss.device))


def add_sums(a, b):
    """The sums of both. a can be None."""
    if a is None:
        return b
    return BlockSums(*[x + y for x, y in zip(a, b)])


def figures(sums):
    """The numbers of the log: mean loss, estimated tau, and the fraction of blocks that are right
    up to each of the K-1 positions.

    tau is 1 (the target's own token) plus the mean number of right guesses before the first wrong
    one. A fraction counts only blocks whose response reaches the position; all reach the first.
    """
    blocks = sums.reached[0].clamp(min=1)
    return {"loss": (sums.loss / sums.weight.clamp(min=1e-9)).item(),  # 0 without any weight
            "tau": 1 + (sums.right_up_to.sum() / blocks).item(),
            "accepted_up_to_slot": (sums.right_up_to / sums.reached.clamp(min=1)).tolist()}
