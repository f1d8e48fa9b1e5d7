"""
CUDA graphs on a CPU: what a replay does not see.

A graph holds kernels with the addresses of their tensors. Python does not run again, so a number
that it read, or a tensor that it bound to a name, is forever the one of the recording. The stand-in
below records torch's operations with their tensors, and runs them again on the same ones.
"""
import contextlib
from typing import NamedTuple

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import decode_state
import draft_decode
import train
from benchmarks.slips import slip
from fast.cuda_graph import Graphs
from decode_state import DecodeState, prefill
from draft_decode import Decoder
from sampling import Sampling
from tests.common import K, small_drafter, small_target, tokens_of
from tests.test_train import changed, small_training_run

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

    def __init__(self, graph, pool=None, capture_error_mode="global"):
        super().__init__()
        assert pool in (None, "the pool")
        assert capture_error_mode == "thread_local"  # or a recording fails beside NCCL's thread
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


@contextlib.contextmanager
def recorded_graphs():
    """Graphs are those of this file; yields the list of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "pool_graphs", [])
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", Recorder)
        patch.setattr(decode_state, "causal_lower_right", unrecorded_mask)
        yield RecordedGraph.pool_graphs


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
    with recorded_graphs() as graphs:
        for number, length in enumerate((2 * P, 5, 2 * P + 1, 2 * P + K + 5, K + 1, P, 2 * P + 9)):
            slot = number % slots
            prompt = tokens_of(length, seed=number).tolist()
            assert replayed.start_sequence(slot, prompt) == plain.start_sequence(slot, prompt), length
            for _ in range(2):
                assert replayed.run_round() == plain.run_round(), length
                for given, expected in zip(tensors_of(replayed), tensors_of(plain)):
                    assert torch.equal(given, expected), length
            if length == P:
                replayed.release_slot(slot)
                plain.release_slot(slot)
        # a round, the last block, and segments from 0 and from P on
        assert len(graphs) == 4


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


def test_graph_refuses_inputs_of_another_shape():
    """One row that a copy repeats for all the rows of a recording."""
    with recorded_graphs():
        graphs = Graphs(torch.device("cuda"))
        for _ in range(2):
            graphs.run("twice", torch.add, torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(AssertionError, match="twice"):
            graphs.run("twice", torch.add, torch.ones(3, 2), torch.ones(1, 2))


# ------------------------------------------------------------------------------------------------
# wrong lines, each of which the check above must catch

RUN = Graphs.run
COMMIT = DecodeState.commit
WRONG_LINES = (  # what is wrong, the function, the right line, the wrong one
    ("inputs of the recording", RUN, "own.copy_(given)", "pass"),
    ("recorded, and not run", RUN, "recording.graph.replay()", "pass"),
    ("a graph of another place", prefill, '("segment", start)', '"segment"'),
    ("features of the next graph", prefill, ".clone()", ""),
    ("tokens of the recording", prefill,
     "forward, segment, prompt_rows)", "lambda rows: forward(segment, rows), prompt_rows)"),
    ("length of the recording", decode_state.forward_and_commit,
     "state.commit(n)", "state.commit(int(n))"),
    ("commit outside of the graph", decode_state.forward_and_commit,
     "state.commit(n)", "setattr(state, 'position', state.position + n)"),
    ("position bound to a new tensor", COMMIT,
     "last_places])\n    self.position += n",
     "last_places])\n    self.position = self.position + n"),
    ("a state of the recording", decode_state.LinearLayerState.delta_rule,
     "longer ones\n        self.S.copy_(S)", "longer ones\n        self.S = S"),
    ("anchor of the recording", Decoder.round_kernels,
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


# ------------------------------------------------------------------------------------------------
# the target's forward in training


def training_run(config, rows, on_cuda):
    run = small_training_run(config, rows)
    run.target_graphs = Graphs(torch.device("cpu"))
    run.target_graphs.on_cuda = on_cuda
    return run


def check_training(config, rows):
    """Steps and an estimate, with graphs and without, on samples of two lengths."""
    config.pad_to_multiple_of = 32  # rows have up to 59 tokens
    with recorded_graphs() as graphs:
        plain = training_run(config, rows, on_cuda=False)
        replayed = training_run(config, rows, on_cuda=True)
        for _ in range(5):
            expected, _ = train.train_step(plain)
            entry, _ = train.train_step(replayed)
            assert entry == expected
            assert torch.equal(replayed.optimizer.gradient, plain.optimizer.gradient)
        samples = plain.micro_batches.samples
        assert train.estimate(replayed, samples) == train.estimate(plain, samples)
        assert set(replayed.target_graphs.recordings) == {(2, 32), (2, 64)}
        assert len(graphs) == 2


def test_training_with_graphs_is_training_without(small_run):
    """Failure 5: a drafter that learns from the features of other samples: of those that were
    recorded, of another length, or of the next micro-batch."""
    check_training(*small_run)


TARGET_FEATURES = train.target_features
WRONG_LINES_OF_TRAINING = (
    ("a graph of another length", TARGET_FEATURES, "run(tokens.shape,", "run('samples',"),
    ("tokens of the recording", TARGET_FEATURES, "def forward(tokens)", "def forward(_)"),
    ("features of the next micro-batch", train.train_step,
     "loss.backward()", "target_features(run, tokens), loss.backward()"),
)


@pytest.mark.parametrize(
    "function, right, wrong", [line[1:] for line in WRONG_LINES_OF_TRAINING],
    ids=[line[0] for line in WRONG_LINES_OF_TRAINING])
def test_graphs_in_training_wrong_line(small_run, function, right, wrong):
    """The check of training with graphs could not fail."""
    with slip(function, right, wrong):
        with pytest.raises((AssertionError, RuntimeError)):
            check_training(*small_run)


def test_warm_up_records_every_length(small_run):
    """A step that waits until its graph is recorded; a resumed run that takes the plain kernels
    where the run before it had graphs."""
    config, rows = small_run
    config.max_length = 100  # padded to 128
    with recorded_graphs():
        run = training_run(config, rows, on_cuda=True)
        train.warm_up(run)
        recordings = run.target_graphs.recordings
        assert set(recordings) == {(2, 64), (2, 128)}
        assert None not in recordings.values()


@pytest.mark.parametrize("values, has_graphs", (
    ({}, True),
    ({"device": "cpu"}, False),
    ({"compile": False}, False),
    ({"parallel": "fsdp"}, False)))
def test_training_has_graphs_only_where_they_can_be(small_run, monkeypatch, values, has_graphs):
    """A CPU that asks CUDA for a graph; a graph that knows addresses of weights which FSDP frees;
    shapes without number; a run that is left without graphs."""
    config, rows = small_run
    on_gpu = {"device": "cuda", "compile": True, "parallel": "ddp"}
    graphs = train.new_target_graphs(changed(config, **on_gpu | values))
    assert (graphs is not None) == has_graphs
    assert graphs is None or graphs.on_cuda
    monkeypatch.setattr(train, "new_target_graphs", lambda config: graphs)
    assert small_training_run(config, rows).target_graphs is graphs


class NoWaits(TorchDispatchMode):
    """Raises where a GPU would have to be waited for."""
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        assert function not in WAITS, function
        return function(*args, **(kwargs or {}))


def test_micro_batch_waits_for_nothing(small_run, monkeypatch):
    """A number that is read from the GPU, or copied to it, in the midst of a micro-batch: nobody
    tells the GPU what comes next, until it has done all before."""
    config, rows = small_run
    # the form of attention for CPUs reads numbers, and flex_attention has no backward here
    monkeypatch.setattr(train, "attention_by_anchor_groups", lambda q, *others: q)
    run = small_training_run(config, rows)
    tokens, supervised = run.micro_batches[0]
    generator = torch.Generator()
    with NoWaits():
        loss, _ = train.micro_batch_loss(run, tokens, supervised, generator, run.drafter)
        loss.backward()
    # it could fail
    for right, wrong in (("weights > 0", "weights > float(weights.min())"),
                         ("torch.full((), operations,", "loss.new_tensor(operations,")):
        with slip(train.micro_batch_loss, right, wrong):
            with pytest.raises(AssertionError), NoWaits():
                train.micro_batch_loss(run, tokens, supervised, generator)
