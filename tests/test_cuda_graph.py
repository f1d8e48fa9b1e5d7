"""
CUDA graphs on a CPU: what a replay does not see.

A graph holds kernels with the addresses of their tensors. Python does not run again, so a number
that it read, or a tensor that it bound to a name, is forever the one of the recording. The stand-in
below records torch's operations with their tensors, and runs them again on the same ones.
"""
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import decode_state
import draft_decode
from benchmarks.slips import slip
from cuda_graph import Graphs
from decode_state import DecodeState, read_prompt
from draft_decode import Decoder
from sampling import Sampling
from tests.common import K, small_drafter, small_target, tokens_of

P = 32      # tokens of a segment

# ------------------------------------------------------------------------------------------------
# a stand-in for torch.cuda.CUDAGraph and torch.cuda.graph

WAITS = (torch.ops.aten._local_scalar_dense.default,    # .item(), int(), bool()
         torch.ops.aten.nonzero.default,
         torch.ops.aten.lift_fresh.default)             # torch.tensor(a number)


class Operation(NamedTuple):
    function: torch._ops.OpOverload
    args: tuple
    kwargs: dict
    results: list       # tensors, with None in place of views of its inputs


class RecordedGraph:
    """Operations of a recording, which share their memory with those of all other graphs."""
    pool_graphs = []

    def __init__(self):
        self.operations = []
        self.pool_graphs.append(self)

    def pool(self):
        return "the pool"

    def replay(self):
        # what graphs computed before is lost, as any of them may use this memory
        for graph in self.pool_graphs:
            for operation in graph.operations:
                for tensor in tensors_in(operation.results):
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        for operation in self.operations:
            results = operation.function(*operation.args, **operation.kwargs)
            for kept, result in zip(operation.results, tensors_in(results), strict=True):
                if kept is not None:
                    kept.copy_(result)


class Recorder(TorchDispatchMode):
    """Records the operations of a `with` block. As they run, what they write is put back after."""

    def __init__(self, graph, pool=None):
        super().__init__()
        assert pool in (None, "the pool")
        self.graph = graph
        self.before = []    # tensors that were written into, and what they held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function in WAITS:
            raise RuntimeError(f"{function} while a graph is recorded: it waits for the device")
        for tensor in written_tensors(function, args, kwargs):
            self.before.append((tensor, tensor.clone()))
        results = function(*args, **kwargs)
        addresses = {memory_of(tensor) for tensor in tensors_in((args, kwargs))}
        kept = tensors_in(results)
        for i, tensor in enumerate(kept):
            if memory_of(tensor) in addresses:
                kept[i] = None
        self.graph.operations.append(Operation(function, args, kwargs, kept))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, values in reversed(self.before):
            tensor.copy_(values)


def unrecorded_mask(*size):
    """torch's mask, which is no tensor that an operation makes; but only its class knows that."""
    with _disable_current_modes():
        return causal_lower_right(*size)


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def written_tensors(function, args, kwargs):
    """The arguments that an operation of torch changes, by its signature."""
    written = []
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in(value)
    return written


# ------------------------------------------------------------------------------------------------
# replays are runs


def new_decoder(slots, sampling, on_cuda):
    decoder = Decoder(small_target(), small_drafter(), 128, K, sampling, batch=slots)
    decoder.reader.segment_length = P
    decoder.reader.pads_segments = True
    decoder.graphs.on_cuda = on_cuda
    return decoder


def tensors_of(decoder):
    """All that a decoder remembers of its sequences."""
    state = decoder.state
    tensors = [decoder.anchor, state.position, state.keys, state.values, state.S, state.window,
               state.conv]
    for keys_and_values in decoder.cache:
        tensors += keys_and_values
    return tensors


@torch.no_grad()
def check_replays(slots, sampling=Sampling()):
    """Prompts of many lengths and rounds after each of them, with graphs and without. Slots are
    filled in turn; when one ends, another goes on."""
    plain = new_decoder(slots, sampling, on_cuda=False)
    replayed = new_decoder(slots, sampling, on_cuda=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "pool_graphs", [])
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", Recorder)
        patch.setattr(decode_state, "causal_lower_right", unrecorded_mask)
        for number, length in enumerate((2 * P, 5, 2 * P + 1, 2 * P + K + 5, K + 1, P, 2 * P + 9)):
            slot = number % slots
            prompt = tokens_of(length, seed=number).tolist()
            assert replayed.prefill(slot, prompt) == plain.prefill(slot, prompt), length
            for _ in range(2):
                assert replayed.next_round() == plain.next_round(), length
                for given, expected in zip(tensors_of(replayed), tensors_of(plain)):
                    assert torch.equal(given, expected), length
            if length == P:
                replayed.end(slot)
                plain.end(slot)
        # a round, the last block, and segments from 0 and from P on
        assert len(RecordedGraph.pool_graphs) == 4


@pytest.mark.parametrize("slots, sampling", ((1, Sampling()), (3, Sampling(1.0, seed=3))))
def test_replays_of_graphs_are_runs(slots, sampling):
    """Failure 5: a prompt or a round that depends on what was decoded when its graph was recorded;
    features that the next graph writes over."""
    check_replays(slots, sampling)


def test_graphs_are_for_cuda_only():
    """A CPU that asks CUDA for a graph."""
    decoder = new_decoder(1, Sampling(), on_cuda=False)
    assert not Graphs(decoder.anchor.device).on_cuda
    assert Graphs(torch.device("cuda", 1)).on_cuda


# ------------------------------------------------------------------------------------------------
# wrong lines, each of which the check above must catch

RUN = Graphs.run
COMMIT = DecodeState.commit
WRONG_LINES = (  # what is wrong, the function, the right line, the wrong one
    ("inputs of the recording", RUN, "own.copy_(given)", "pass"),
    ("recorded, and not run", RUN, "recording.graph.replay()", "pass"),
    ("a graph of another place", read_prompt, '("segment", start)', '"segment"'),
    ("features of the next graph", read_prompt, ".clone()", ""),
    ("tokens of the recording", read_prompt,
     "forward, segment, prompt_rows)", "lambda rows: forward(segment, rows), prompt_rows)"),
    ("length of the recording", decode_state.forward_and_commit,
     "state.commit(n)", "state.commit(int(n))"),
    ("commit outside of the graph", decode_state.forward_and_commit,
     "state.commit(n)", "setattr(state, 'position', state.position + n)"),
    ("position bound to a new tensor", COMMIT,
     "last_places])\n    self.position += n",
     "last_places])\n    self.position = self.position + n"),
    ("a state of the recording", decode_state.LinearLayerState.delta_rule,
     "self.S.copy_(S)", "self.S = S"),
    ("anchor of the recording", Decoder.run_round,
     "self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])",
     "self.anchor = choices.gather(1, accepted[:, None])[:, 0]"),
    ("a round that waits", draft_decode.count_accepted,
     "right.long().cumprod(-1).sum(-1)", "right.long().cumprod(-1).sum(-1) + 0 * int(right.sum())"),
)


@pytest.mark.parametrize(
    "function, right, wrong", [line[1:] for line in WRONG_LINES],
    ids=[line[0] for line in WRONG_LINES])
def test_graphs_wrong_line(function, right, wrong):
    """The check of this file could not fail: a replay sees what Python does."""
    with slip(function, right, wrong):
        with pytest.raises((AssertionError, IndexError, RuntimeError)):
            check_replays(slots=1)
