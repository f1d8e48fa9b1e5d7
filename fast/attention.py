"""
The drafter's attention in training without one large mask: masked_attend() of model.py, faster.

    flex_attend       for GPUs. flex_attention skips tiles of scores that the mask hides
    grouped_attend    for CPUs, where flex_attention has no backward
"""
import torch
import torch.nn.functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

# Compiled, because the eager versions store all scores and the full mask. Each T compiles once.
compiled_flex_attention = torch.compile(flex_attention, dynamic=False)
compiled_create_block_mask = torch.compile(create_block_mask, dynamic=False)

# For heads of more than 128 channels, torch gives the backward kernel 4 warps. With 8 warps it is
# faster, and the bits are the same.
WIDE_HEAD_OPTIONS = {"bwd_num_warps": 8}


def flex_attend(visible, anchors, T, K):
    """masked_attend() with flex_attention."""
    B, A = anchors.shape
    query_count = A * K
    key_count = T + query_count
    create = compiled_create_block_mask
    if key_count <= 128:
        create = create_block_mask  # torch.compile cannot generate code for a mask of one tile
    mask = create(visible, B, None, query_count, key_count, anchors.device)

    def attend(q, context_k, context_v, block_k, block_v):
        k = torch.cat((context_k, block_k), 2)
        v = torch.cat((context_v, block_v), 2)
        options = WIDE_HEAD_OPTIONS if q.shape[-1] > 128 else None
        return compiled_flex_attention(
            q, k, v, block_mask=mask, enable_gqa=True, kernel_options=options)

    return attend


def grouped_attend(visible, anchors, T, K, group_size=8):
    """masked_attend() for groups of neighboring anchors.

    A group needs only its own blocks and the context before its last anchor. Anchors ascend, so the
    first groups multiply few keys.
    """
    B, A = anchors.shape
    batch = torch.arange(B, device=anchors.device)[:, None, None]
    all_queries = torch.arange(A * K, device=anchors.device)

    @torch.compiler.disable  # because shapes depend on the data
    def attend(q, context_k, context_v, block_k, block_v):
        heads_per_key = q.shape[1] // block_k.shape[1]
        outputs = []
        for first in range(0, A, group_size):
            # the blocks of this group, and how many tokens of context they can see
            own = slice(first * K, (first + group_size) * K)
            seen_tokens = int(anchors[:, first:first + group_size].max())
            keys = torch.cat((context_k[:, :, :seen_tokens], block_k[:, :, own]), 2)
            values = torch.cat((context_v[:, :, :seen_tokens], block_v[:, :, own]), 2)

            # the mask; queries and keys are numbered as in block_visibility()
            queries = all_queries[own]
            context_numbers = torch.arange(seen_tokens, device=anchors.device)
            key_numbers = torch.cat((context_numbers, T + queries))
            mask = visible(batch, 0, queries[:, None], key_numbers)          # (B, queries, keys)

            # Query heads that share a key head become more queries of one head, so that keys are
            # not copied. The mask is repeated for them.
            stacked = q[:, :, own].unflatten(1, (-1, heads_per_key))
            stacked = stacked.flatten(2, 3)                 # (B, Hkv, heads_per_key * queries, D)
            mask = mask[:, None].repeat(1, 1, heads_per_key, 1)
            o = F.scaled_dot_product_attention(stacked, keys, values, mask)
            o = o.unflatten(2, (heads_per_key, -1))
            outputs.append(o.flatten(1, 2))
        return torch.cat(outputs, 2)

    return attend
