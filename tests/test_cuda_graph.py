"""
CUDA graphs on a CPU: numbers and tensors that a replay does not see.

A graph contains kernels with the addresses of their tensors. Python does not run again, so a replay
has the numbers and tensors that Python saw during the recording. The class below records torch's
operations with their tensors, and runs them again on the same tensors.
"""
import contextlib

import pytest
import torch
from torch.nn.attention.bias import causal_lower_right
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_leaves

import decode_state
import train
from fast import prefill
from fast import training as fast_training
from fast.attention import flex_attend, grouped_attend
from fast.cuda_graph import Graphs
from draft_decode import Decoder
from loss import chunk_loss
from model import masked_attend
from sampling import Sampling
from tests.common import K, small_drafter, small_target, tokens_of
from tests.test_train import changed, small_training_run

P = 32      # tokens of a segment

# ------------------------------------------------------------------------------------------------
# a replacement for torch.cuda.CUDAGraph and torch.cuda.graph

WAITS = (torch.ops.aten._local_scalar_dense.default,    # .item(), int(), bool()
         torch.ops.aten.nonzero.default,
         torch.ops.aten.lift_fresh.default)             # torch.tensor(a number)


class RecordedGraph:
    """A recording: operations (function, args, kwargs, results). Instead of results that are views
    of arguments there is None. All graphs share the memory of their results."""
    pool_graphs = []

    def __init__(self):
        self.operations = []
        self.pool_graphs.append(self)

    def pool(self):
        return "the pool"

    def replay(self):
        # the results of all graphs are lost, because graphs share their memory
        for graph in self.pool_graphs:
            for *_, results in graph.operations:
                for tensor in tensors_in(results):
                    if tensor.is_floating_point():
                        tensor.fill_(torch.nan)
        for function, args, kwargs, all_kept in self.operations:
            results = function(*args, **kwargs)
            for kept, result in zip(all_kept, tensors_in(results), strict=True):
                if kept is not None:
                    kept.copy_(result)


class Recorder(TorchDispatchMode):
    """Records the operations of a `with` block. It runs them and then restores what they wrote."""

    def __init__(self, graph, pool=None, capture_error_mode="global"):
        super().__init__()
        is_first = graph.pool_graphs == [graph]
        assert pool == (None if is_first else "the pool")  # else each graph has its own memory
        assert capture_error_mode == "thread_local"  # else NCCL's thread breaks a recording
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
        self.graph.operations.append((function, args, kwargs, kept))
        return results

    def __exit__(self, *error):
        super().__exit__(*error)
        for tensor, values in reversed(self.before):
            tensor.copy_(values)


def unrecorded_mask(*size):
    """torch's mask, which no operation computes, although the recorder cannot know that."""
    with _disable_current_modes():
        return causal_lower_right(*size)


def tensors_in(tree):
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def memory_of(tensor):
    return tensor.untyped_storage().data_ptr()


def written_tensors(function, args, kwargs):
    """The arguments that an operation of torch changes, per its signature."""
    written = []
    for i, argument in enumerate(function._schema.arguments):
        value = args[i] if i < len(args) else kwargs.get(argument.name)
        if argument.alias_info is not None and argument.alias_info.is_write:
            written += tensors_in(value)
    return written


@contextlib.contextmanager
def recorded_graphs():
    """Uses the graphs of this file, and yields the list of them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(RecordedGraph, "pool_graphs", [])
        patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
        patch.setattr(torch.cuda, "graph", Recorder)
        patch.setattr(decode_state, "causal_lower_right", unrecorded_mask)
        yield RecordedGraph.pool_graphs


# ------------------------------------------------------------------------------------------------
# replays are runs


def new_decoder(slots, sampling, on_cuda):
    decoder = Decoder(
        small_target(), small_drafter(), length=128, tokens_per_forward=K, sampling=sampling,
        batch=slots)
    decoder.state.segment_length = P
    decoder.state.pads_segments = True
    decoder.graphs.on_cuda = on_cuda
    return decoder


def tensors_of(decoder):
    """A decoder's state."""
    state = decoder.state
    tensors = [decoder.anchor, state.position, state.keys, state.values, state.S,
               state.delta_inputs, state.conv]
    for keys_and_values in decoder.cache:
        tensors += keys_and_values
    return tensors


@torch.no_grad()
@pytest.mark.parametrize("slots, sampling, shortest, graph_count", (
    (1, Sampling(), 256, 4), (3, Sampling(1.0, seed=3), 256, 4), (1, Sampling(), 16, 5)))
def test_replays_of_graphs_are_runs(monkeypatch, slots, sampling, shortest, graph_count):
    """Failure 5: a prompt or round depends on what was decoded when its graph was recorded, or the
    next graph overwrites features, or short and long prompts replay each other's graphs."""
    monkeypatch.setattr(prefill, "SHORTEST_SEGMENT", shortest)
    plain = new_decoder(slots, sampling, on_cuda=False)
    replayed = new_decoder(slots, sampling, on_cuda=True)
    with recorded_graphs() as graphs:
        lengths = (2 * P, 5, 2 * P + K + 5, K + 1, P, 2 * P + 9, 7)
        for number, length in enumerate(lengths):
            slot = number % slots
            prompt = tokens_of(length, seed=number).tolist()
            first = replayed.start_sequences({slot: prompt}, {slot: 0})
            assert first == plain.start_sequences({slot: prompt}, {slot: 0}), length
            for _ in range(2):
                assert replayed.run_round() == plain.run_round(), length
                for given, expected in zip(tensors_of(replayed), tensors_of(plain)):
                    assert torch.equal(given, expected), length
            if length == P:
                replayed.release_slot(slot)
                plain.release_slot(slot)
        # a round, segments at 0 and after P, and the last block, of short prompts too
        assert len(graphs) == graph_count


def test_graph_refuses_inputs_of_another_shape():
    """A copy repeats one row for all rows of a recording; a CPU asks CUDA for a graph."""
    assert not Graphs(torch.device("cpu")).on_cuda
    with recorded_graphs():
        graphs = Graphs(torch.device("cuda", 1))
        for _ in range(2):
            graphs.run("twice", torch.add, torch.ones(3, 2), torch.ones(3, 2))
        with pytest.raises(AssertionError, match="twice"):
            graphs.run("twice", torch.add, torch.ones(3, 2), torch.ones(1, 2))


# ------------------------------------------------------------------------------------------------
# the target's forward in training


def training_run(config, rows, has_graphs):
    """(run, graphs): a run of the small models, whose target runs with graphs if has_graphs."""
    run = small_training_run(config, rows)
    graphs = Graphs(torch.device("cpu"))
    graphs.on_cuda = True
    if has_graphs:
        run.target_features = fast_training.with_graphs(run.target_features, graphs)
    return run, graphs


def test_training_with_graphs_is_training_without(small_run):
    """Failure 5: a drafter learns from the features of other samples, such as the recorded ones,
    the next micro-batch, or samples of a different length."""
    config, rows = small_run
    config.pad_to_multiple_of = 32  # rows have up to 59 tokens
    with recorded_graphs() as recordings:
        plain, _ = training_run(config, rows, has_graphs=False)
        replayed, graphs = training_run(config, rows, has_graphs=True)
        for _ in range(4):
            expected, _ = train.train_step(plain)
            entry, _ = train.train_step(replayed)
            assert entry == expected
            assert torch.equal(replayed.optimizer.gradient, plain.optimizer.gradient)
        samples = plain.micro_batches.samples
        assert train.evaluate(replayed, samples) == train.evaluate(plain, samples)
        assert set(graphs.recordings) == {(2, 32), (2, 64)}
        assert len(recordings) == 2


def test_warm_up_records_every_length(small_run):
    """A step waits for its graph to be recorded, or a resumed run uses eager kernels where the run
    before it used graphs."""
    config, rows = small_run
    config.max_length = 100  # padded to 128
    with recorded_graphs():
        run, graphs = training_run(config, rows, has_graphs=True)
        fast_training.warm_up(run, train.micro_batch_loss)
        assert list(graphs.recordings) == [(2, 128), (2, 64)]  # so 64 reuses the memory of 128
        assert None not in graphs.recordings.values()


@pytest.mark.parametrize("values, has_graphs", (
    ({}, True),
    ({"device": "cpu"}, False),
    ({"compile": False}, False),
    ({"parallel": "fsdp"}, False)))
def test_training_is_prepared_by_its_keys(small_run, monkeypatch, values, has_graphs):
    """A CPU uses CUDA graphs or flex_attention; weights that FSDP shards are joined or in a graph;
    compile has no effect; a ninth length is not compiled, so all scores exist at once."""
    config, rows = small_run
    run = small_training_run(config, rows)
    run.new_attend = None
    run.config = changed(config, **{"device": "cuda", "compile": True, "parallel": "ddp"} | values)
    compiled = []
    joined = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda layer, dynamic: compiled.append(layer))
    monkeypatch.setattr(torch, "compile", lambda function, dynamic: (function, "compiled"))
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    monkeypatch.setattr(fast_training, "with_graphs", lambda features, graphs: graphs)
    monkeypatch.setattr(fast_training, "join_projections", joined.append)
    fast_training.prepare_for_training(run)
    assert isinstance(run.target_features, Graphs) == has_graphs
    assert bool(joined) == (run.config.parallel == "ddp")
    assert run.new_attend is (grouped_attend if run.config.device == "cpu" else flex_attend)
    assert torch._dynamo.config.recompile_limit >= 256 // 16  # nano's lengths
    assert compiled == [*run.target.layers, *run.drafter.layers] * run.config.compile
    assert run.chunk_loss == ((chunk_loss, "compiled") if run.config.compile else chunk_loss)


def test_micro_batch_waits_for_nothing(small_run):
    """A micro-batch copies a number from the GPU or to it, so the GPU waits for the CPU."""
    config, rows = small_run
    run = small_training_run(config, rows)
    run.new_attend = masked_attend  # grouped_attend() reads numbers
    tokens, supervised = run.micro_batches[0]
    generator = torch.Generator()
    with recorded_graphs(), Recorder(RecordedGraph(), capture_error_mode="thread_local"):
        loss, _ = train.micro_batch_loss(run, tokens, supervised, generator, run.drafter)
        loss.backward()
