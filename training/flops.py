"""
Counts the floating-point operations of a training step, of prefill, and of the delta rule, and
compares them with a GPU's peak. A multiply-add counts as two operations.
"""
import torch

from delta_rule import chunk_length
from training.parallel import world_size

# dense bf16 operations per second, from data sheets; names are matched in this order
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "RTX 4090": 165e12, "B200": 2250e12}


def training_operations(drafter, target, B, T, A):
    """Operations of a training step on B samples of T tokens with A anchors each.

    A weight matrix costs two operations per entry and token in the forward and four in the
    backward, but only two in the backward if its input needs no gradient. The target runs up to
    the last feature layer. It is frozen, so it has no backward.
    """
    c = drafter.config
    K = drafter.block_size
    block_tokens = A * K

    context_weights = 0  # k_proj and v_proj process the context in addition to the blocks
    for layer in drafter.layers:
        context_weights += parameter_count(layer.self_attn.k_proj)
        context_weights += parameter_count(layer.self_attn.v_proj)
    layers = 6 * parameter_count(drafter.layers) * block_tokens
    layers += 6 * context_weights * T
    layers += 4 * parameter_count(drafter.fc) * T  # the features need no gradient

    # two products forward and four backward; on average a block attends to half of the context
    attention_width = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    attention = 12 * attention_width * block_tokens * (T / 2 + K)

    # the logits, and the gradient with respect to their input
    head = 4 * c.vocab_size * c.hidden_size * A * (K - 1)

    v = torch.empty(0, target.config.linear_value_head_dim, device=target.head_weight.device)
    used_layers = max(drafter.target_layer_ids) + 1
    features = target_operations(target, T, chunk_length(v), used_layers)
    return int(B * (layers + attention + head + features))


def prefill_operations(target, T, chunk):
    """Operations of the prefill of T tokens, including the head for the last token."""
    return target_operations(target, T, chunk, len(target.layers)) + 2 * target.head_weight.numel()


def target_operations(target, T, chunk, used_layers):
    """Operations of the target's first layers in a forward on T tokens.

        2 * weights * T             the matmuls
        2 * H * D * T * (T + 1)     a full layer: token t attends to t tokens, so a head has
                                    T (T + 1) / 2 pairs of tokens. Each pair costs 2 D operations
                                    in q k^T and 2 D in the product with v
        the delta rule              a linear layer, in chunks of this many tokens
    """
    c = target.config
    weights = 0
    for p in target.layers[:used_layers].parameters():
        if p.dim() == 2:
            weights += p.numel()
    attention = 2 * c.num_attention_heads * c.head_dim * T * (T + 1)
    delta_rule = delta_rule_operations(
        T, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim, chunk)
    kinds = c.layer_types[:used_layers]
    operations = 2 * weights * T
    operations += kinds.count("full_attention") * attention
    return operations + kinds.count("linear_attention") * delta_rule


def delta_rule_operations(T, heads, D, Dv, chunk):
    """Operations of the chunked delta rule's forward on T tokens with `heads` value heads.

    In the names of delta_rule.py, a chunk of C tokens costs per head:

        2 C C D         A, from k k^T           2 C C D     P, from q k^T
        2 C C D         Y = M [decay] k         2 C C Dv    U = M v
        2 C D Dv        W = U - Y S             2 C D Dv    the next S, from k^T W
        2 C D Dv        o, from q S             2 C C Dv    and from P W
        C C C           M: a triangular system with C right-hand sides, C C operations each
    """
    C = chunk
    per_chunk = 6 * C * C * D + 4 * C * C * Dv + 6 * C * D * Dv + C * C * C
    chunks = -(-T // C)  # the last one is padded
    return heads * chunks * per_chunk


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


def mfu(operations_per_second, device, dtype):
    """Model FLOPs utilization: the fraction of all GPUs' peak. None if the peak is unknown."""
    if device != "cuda" or dtype != "bfloat16":
        return None
    for name, peak in PEAK.items():
        if name in torch.cuda.get_device_name():
            return operations_per_second / (peak * world_size())
    return None
