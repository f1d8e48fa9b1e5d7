"""
For a CPU only: packed weights, activation functions whose bits do not depend on threads, and one
thread for small models.
"""
import os

import torch

MIN_PACKED = 1 << 18        # packing makes weights of this size and more faster
PARALLEL_ELEMENTS = 32768   # torch gives no thread fewer elements than this
SMALL = 50_000_000          # below this many parameters, one thread is enough


def use_one_thread_if_small(target):
    """Let torch use one thread if the target is small. OMP_NUM_THREADS wins if it is set.

    On a quiet machine a second thread makes decoding of such a target 10 % faster. Next to other
    busy processes the two threads wait for each other, and decoding gets ten times slower or more.
    """
    parameters = sum(parameter.numel() for parameter in target.parameters())
    if parameters < SMALL and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(1)


class PackedWeight:
    """A copy of a frozen weight (outputs, inputs) in the order in which oneDNN reads it.

    Compared with F.linear, a matmul with one token is 1.3 times faster, and with 16 tokens two to
    four times. The bits of a token's output depend only on that token.
    """

    def __init__(self, weight):
        self.packed = torch.ops.mkldnn._reorder_linear_weight(weight.detach(), 16)

    @torch.compiler.disable
    def product(self, x):
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, None, "none", [], "")


def pack_weight(weight):
    """A PackedWeight, or None for small weights, GPUs, other dtypes, and older CPUs."""
    if weight.device.type != "cpu" or weight.numel() < MIN_PACKED:
        return None
    if not torch.backends.mkldnn.is_available():
        return None
    if weight.dtype == torch.bfloat16:
        if not torch.ops.mkldnn._is_mkldnn_bf16_supported():
            return None
    elif weight.dtype != torch.float32:
        return None
    return PackedWeight(weight)


def on_few_tokens(function, x):
    """function(x), elementwise, for x (B, T, ...). Blocks are split into parts of a few tokens.

    Threads split a large tensor at any element, also inside a token. At the split, scalar code
    takes over from vector code, and the two round exp differently. Then the bits of a token would
    depend on its place among the tokens of all B blocks. So torch gets parts that a single thread
    handles. Prompts are split too. They do not need it, but it costs only a few percent.
    """
    if x.device.type != "cpu" or x.numel() <= PARALLEL_ELEMENTS:
        return function(x)
    tokens = x.flatten(0, 1)
    tokens_at_once = max(1, PARALLEL_ELEMENTS // tokens[0].numel())
    parts = [function(part) for part in tokens.split(tokens_at_once)]
    return torch.cat(parts).view(x.shape)
