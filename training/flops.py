"""
How many floating-point operations a training step, the reading of a prompt and the delta rule make,
and what share of a GPU's peak that is.
"""
import torch

from training.parallel import world_size

# Dense bf16 operations a second, from data sheets. Names are matched in this order.
PEAK = {"H200": 989e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12, "L40S": 362e12,
        "RTX 4090": 165e12, "B200": 2250e12}


def training_operations(drafter, B, T, A, target=None):
    """Operations of a training step of B rows of T tokens with A anchors each.

    A multiply-add counts as two. A weight matrix costs two operations per entry and row forward and
    four backward, but only two backward if its input needs no gradient. With `target` its forward,
    up to the last layer that gives features, is counted too.
    """
    c = drafter.config
    K = drafter.block_size
    block_rows = A * K

    context_weights = 0  # k_proj and v_proj see the context besides the blocks
    for layer in drafter.layers:
        context_weights += parameter_count(layer.self_attn.k_proj)
        context_weights += parameter_count(layer.self_attn.v_proj)
    layers = 6 * parameter_count(drafter.layers) * block_rows
    layers += 6 * context_weights * T
    layers += 4 * parameter_count(drafter.fc) * T  # the features need no gradient

    # two products forward and four backward; a block sees half of the context on average
    attention_width = c.num_hidden_layers * c.num_attention_heads * c.head_dim
    attention = 12 * attention_width * block_rows * (T / 2 + K)

    # the logits, and the gradient by their input
    head = 4 * c.vocab_size * c.hidden_size * A * (K - 1)

    features = 0
    if target is not None:
        used_layers = target.layers[:max(drafter.target_layer_ids) + 1]
        features = 2 * parameter_count(used_layers) * T
    return int(B * (layers + attention + head + features))


def prefill_operations(target, T, chunk):
    """Operations of reading a prompt of T tokens, to the logits of its last one. A multiply-add
    counts as two.

        2 * weights * T                 the layers' products, each weight once for every token
        2 * H * D * T * (T + 1)         a full layer: q k^T and the product with v, 2 D operations
                                        each, for every head and each pair of a token and one that
                                        it sees
        the delta rule                  of a linear layer, in chunks of this many tokens
        2 * V * width                   the head, for one token
    """
    c = target.config
    weights = 0
    for p in target.layers.parameters():
        if p.dim() == 2:
            weights += p.numel()
    attention = 2 * c.num_attention_heads * c.head_dim * T * (T + 1)
    delta_rule = delta_rule_operations(
        T, c.linear_num_value_heads, c.linear_key_head_dim, c.linear_value_head_dim, chunk)
    operations = 2 * weights * T
    operations += c.layer_types.count("full_attention") * attention
    operations += c.layer_types.count("linear_attention") * delta_rule
    operations += 2 * target.head_weight.numel()
    return operations


def delta_rule_operations(T, heads, D, Dv, chunk):
    """Operations of target.gated_delta_rule, forward, on T tokens with `heads` value heads.

    They are those of its products and of its triangular solve. A head's chunk of C tokens makes, in
    the names used there:

        2 C C D         A, from k k^T
        C C C           M: a triangular system with C right-hand sides, C C operations each
        2 C C Dv        U = M v
        2 C C D         Y = M [fade] k
        2 C C D         P, from q k^T
        2 C D Dv        W = U - Y S
        2 C D Dv        the next S, from k^T W
        2 C D Dv        o, from q S
        2 C C Dv        and from P W

    The backward pass makes twice as many, as each product has two gradients; of the solve that is
    about right.
    """
    C = chunk
    of_chunk = 6 * C * C * D + 4 * C * C * Dv + 6 * C * D * Dv + C * C * C
    chunks = -(-T // C)  # the last one is padded
    return heads * chunks * of_chunk


def parameter_count(module):
    return sum(p.numel() for p in module.parameters())


def mfu(operations_per_second, device, dtype):
    """Model FLOPs utilisation: the share of all GPUs' peak. None where the peak is not known."""
    if device != "cuda" or dtype != "bfloat16":
        return None
    gpu = torch.cuda.get_device_name()
    for name, peak in PEAK.items():
        if name in gpu:
            return operations_per_second / (peak * world_size())
    return None
