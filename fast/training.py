"""
What makes training faster. A run trains the same without it, up to rounding.

    prepare_for_training(run)           # once, before the first step
    warm_up(run, micro_batch_loss)      # compile for every length of samples

`run` is the Run of train.py. Three functions of a step are replaced from outside: run.chunk_loss,
run.target_features, and run.new_attend, the drafter's attention.
"""
import torch

from fast.attention import flex_attend, grouped_attend
from fast.cuda_graph import Graphs
from fast.decoding import join_projections, tf32_if_bfloat16


def prepare_for_training(run):
    """Choose the drafter's attention. With --compile, also compile and prepare CUDA graphs."""
    config = run.config
    run.new_attend = flex_attend
    if config.device == "cpu":
        run.new_attend = grouped_attend  # flex_attention has no backward on CPUs

    # FSDP shards the weights, so they cannot be joined.
    if config.parallel != "fsdp":
        join_projections(run.target.layers)
    run.target_features = tf32_if_bfloat16(run.target)(run.target_features)

    # torch.compile gives up after 8 versions of a function, but every length of samples and every
    # kind of layer needs one. flex_attention is compiled even without --compile.
    torch._dynamo.config.recompile_limit = 64
    if not config.compile:
        return

    # Each layer is compiled by itself, so all layers of a kind share the code. Static shapes are
    # faster, and pad() makes few of them.
    for layer in (*run.target.layers, *run.drafter.layers):
        layer.compile(dynamic=False)
    run.chunk_loss = torch.compile(run.chunk_loss, dynamic=False)

    # FSDP gathers the target's weights at changing addresses, so a graph cannot contain them.
    if config.device == "cuda" and config.parallel != "fsdp":
        graphs = Graphs(torch.device(config.device))
        run.target_features = with_graphs(run.target_features, graphs)


def with_graphs(target_features, graphs):
    """target_features(tokens) as a CUDA graph for each shape of tokens.

    The features are valid until the next call. That is long enough, because the backward of a
    micro-batch ends before the next micro-batch begins, and an evaluation has no backward.
    """
    def replayed_features(tokens):
        return graphs.run(tokens.shape, target_features, tokens)

    return replayed_features


def warm_up(run, micro_batch_loss):
    """Compile for every length of samples before the first step.

    Each length runs twice, because the target's first forward runs eagerly and its second one is
    recorded as a graph. The longest comes first, so that shorter ones reuse its memory.
    """
    config = run.config
    multiple = config.pad_to_multiple_of
    lengths = range(multiple, config.max_length + multiple, multiple)
    for T in reversed(lengths):
        tokens = torch.zeros(config.batch_size, T, dtype=torch.long, device=config.device)
        supervised = torch.ones_like(tokens, dtype=torch.bool)
        for _ in range(2):
            loss, _ = micro_batch_loss(
                run, tokens, supervised, torch.Generator(), run.wrapped_drafter)
            loss.backward()
            run.optimizer.zero_grad(set_to_none=True)
