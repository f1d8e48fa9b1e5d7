"""
Several projections of one input as one product, with the weights where the checkpoint has them.

    join_projections(model)     # a frozen model, for decoding; model.project() then sees it

In decoding a product has few rows. On a GPU a small one takes as long as one of several times its
size, so fewer and larger ones are faster. An entry of a product depends on its own row and column
alone, so columns may stand side by side.
"""
import torch

# names of layers that a module calls together, in the order in which it calls them
GROUPS = (
    ("q_proj", "k_proj", "v_proj"),                             # attention, target's and drafter's
    ("gate_proj", "up_proj"),                                   # MLP
    ("in_proj_qkv", "in_proj_z", "in_proj_b", "in_proj_a"),     # Gated DeltaNet
)


def groups_of(model):
    """Yields lists of layers that have an input in common."""
    for module in model.modules():
        for names in GROUPS:
            if hasattr(module, names[0]):
                yield [getattr(module, name) for name in names]


def join_projections(model):
    """Join the weights of each group. They must not change any more. Returns the model."""
    for layers in groups_of(model):
        # biases are rare: where there are some, nothing is joined
        if all(layer.bias is None for layer in layers):
            join(layers)
    return model


def join(layers):
    """Make the weights of these layers views of one tensor.

    A layer gets as joined_weight the rows from its own on. So one product makes what it and those
    after it do: a drafter's context needs keys and values, and no queries.
    """
    joined_weight = torch.cat([layer.weight.data for layer in layers])
    first = 0
    for layer in layers:
        end = first + layer.out_features
        layer.weight.data = joined_weight[first:end]
        layer.joined_weight = joined_weight[first:]
        layer.packed_product = None
        first = end


def unjoin_projections(model):
    """Let each layer run on its own again, as layers must whose weights are to be sharded."""
    for layers in groups_of(model):
        for layer in layers:
            if hasattr(layer, "joined_weight"):
                del layer.joined_weight, layer.packed_product
