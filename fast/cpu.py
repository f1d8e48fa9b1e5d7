"""
What only a CPU needs. A GPU can do without all of it.

Four things. Large frozen weights are packed once into the order in which oneDNN reads them, so
that products with few rows run faster. Elementwise functions are applied to few rows at a time
where torch would split one row over two threads, as that would make a row's bits depend on its
place. A small model is decoded with one thread. And the drafter's attention in training has a form
of its own, as flex_attention has no backward on CPUs.
"""
import os

import torch
import torch.nn as nn
import torch.nn.functional as F

from fast.projections import groups_of

MIN_PACKED = 1 << 18        # numbers in a weight from which packing pays
PARALLEL_ELEMENTS = 32768   # torch gives no thread fewer elements than this
SMALL = 50_000_000          # parameters below which one thread is enough


def use_one_thread_if_small(target):
    """Let torch use one thread if the target is small and on a CPU.

    On a quiet machine a second thread makes the decoding of such a target a tenth faster. Beside
    other busy processes the two wait for each other, and it becomes ten times slower and more
    (docs/efficiency.md). Where OMP_NUM_THREADS is set, that decides.
    """
    parameters = sum(parameter.numel() for parameter in target.parameters())
    on_cpu = target.embed_tokens.weight.device.type == "cpu"
    if on_cpu and parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


def pack_target(target):
    """Let a frozen target whose projections are joined use packed weights; returns the target."""
    for layers in groups_of(target):
        layers[0].packed_product = pack_weight(layers[0].joined_weight)
    pack_linears(target.layers)
    target.packed_head = pack_weight(target.head_weight)  # the embedding's own weight where tied
    return target


def pack_linears(module):
    """Let the bias-free linear layers of a frozen module use packed weights; returns the module."""
    for layer in module.modules():
        if not isinstance(layer, nn.Linear) or layer.bias is not None:
            continue
        if hasattr(layer, "joined_weight"):
            continue  # it is computed as part of a joined product
        packed_product = pack_weight(layer.weight)
        if packed_product is not None:
            layer.forward = packed_product
    return module


def pack_weight(weight):
    """The function x -> x W^T for a frozen weight W (N, K), from a packed copy of it.

    None where packing does not pay or does not exist: small weights, other devices, older CPUs.
    One row runs 1.3 times as fast as by F.linear, sixteen rows two to four times, and the bits of
    a row depend on that row alone.
    """
    if weight.device.type != "cpu" or weight.numel() < MIN_PACKED:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
    elif weight.dtype != torch.float32:
        return None
    packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)

    @torch.compiler.disable
    def packed_product(x):
        return torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")

    return packed_product


def rowwise(function, x):
    """function(x), elementwise, for x (B, T, ...); few rows at a time for blocks on a CPU.

    Threads split a large tensor at any element, also inside a row. At the seam scalar code takes
    over from vector code and rounds exp differently. Then the bits of a row would depend on where
    among the rows of all B blocks it stands. So torch is given no more than one thread takes. A
    prompt, which has more than 64 rows, is read alone and needs none of this.
    """
    if x.device.type != "cpu" or x.numel() <= PARALLEL_ELEMENTS or x.shape[1] > 64:
        return function(x)
    rows = x.flatten(0, 1)
    rows_at_once = max(1, PARALLEL_ELEMENTS // rows[0].numel())
    parts = [function(part) for part in rows.split(rows_at_once)]
    return torch.cat(parts).view(x.shape)


@torch.compiler.disable  # its shapes follow the data
def attention_by_anchor_groups(
        q,
        context_k,
        context_v,
        block_k,
        block_v,
        anchors,
        visible,
        group_size=8):
    """The drafter's attention in training, (B, H, A K, D): what flex_attention does on GPUs.

    q (B, H, A K, D) are the slots of the blocks; context_k, context_v (B, Hkv, T, D) the context;
    block_k, block_v (B, Hkv, A K, D) the blocks' own; visible comes from block_visibility().

    Anchors are taken in groups of neighbours. A group needs its own blocks, and the context before
    its last anchor only: anchors ascend, so early groups multiply few keys.
    """
    B, A = anchors.shape
    K = q.shape[2] // A
    T = context_k.shape[2]
    heads_per_key = q.shape[1] // block_k.shape[1]
    device = q.device
    batch = torch.arange(B, device=device)[:, None, None]
    all_slots = torch.arange(A * K, device=device)

    outputs = []
    for first in range(0, A, group_size):
        # the slots of the blocks of this group, and how many tokens of context they can see
        own = slice(first * K, (first + group_size) * K)
        seen_tokens = int(anchors[:, first:first + group_size].max())
        seen_k = context_k[:, :, :seen_tokens]
        seen_v = context_v[:, :, :seen_tokens]
        keys = torch.cat((seen_k, block_k[:, :, own]), 2)
        values = torch.cat((seen_v, block_v[:, :, own]), 2)

        # queries and keys by the numbers that block_visibility() gives them, for the mask
        query_numbers = all_slots[own]
        context_numbers = torch.arange(seen_tokens, device=device)
        key_numbers = torch.cat((context_numbers, T + query_numbers))
        mask = visible(batch, 0, query_numbers[:, None], key_numbers)         # (B, queries, keys)

        # Several query heads share a key head. Their queries are put one after another, as if they
        # were more queries of one head, and the mask is repeated for them. So no key is copied.
        stacked = q[:, :, own].unflatten(1, (-1, heads_per_key))
        stacked = stacked.flatten(2, 3)                     # (B, Hkv, heads_per_key * queries, D)
        mask = mask[:, None].repeat(1, 1, heads_per_key, 1)  # (B, 1, heads_per_key * queries, keys)
        o = F.scaled_dot_product_attention(stacked, keys, values, mask)
        o = o.unflatten(2, (heads_per_key, -1))
        outputs.append(o.flatten(1, 2))
    return torch.cat(outputs, 2)
