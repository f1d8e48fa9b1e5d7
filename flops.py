"""
How many floating-point operations a training step makes, and what share of a GPU's peak that is.
"""
import torch

from parallel import world_size

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
