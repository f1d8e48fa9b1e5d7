"""
Forwards as CUDA graphs: recorded once, then replayed. On a CPU they just run.

    graphs = Graphs(device)
    features, hidden = graphs.run("a block", function, tokens)      # runs function(tokens)
    features, hidden = graphs.run("a block", function, tokens)      # records it, and replays that
    features, hidden = graphs.run("a block", function, tokens)      # replays it

A forward is a thousand kernels. Python launches them one by one, which takes longer than most of
them run. A graph is a recording of all these launches, and is launched at once.
"""
from typing import NamedTuple

import torch


class Recording(NamedTuple):
    """A graph with the tensors that it reads and fills."""
    graph: torch.cuda.CUDAGraph
    inputs: list
    outputs: object     # as the function returned them


class Graphs:
    """Recordings by name. A recording holds addresses and launches. Python does not run again, so:

    - Shapes are always the same.
    - A number that changes is a tensor: an input, or something that the function itself keeps. An
      int has to be part of the name, so that there is a graph for each of its values.
    - What outlives a run is changed in place. Only the outputs may be new tensors.
    - Outputs are valid until the next run of any name, because all graphs share their memory.
    """

    def __init__(self, device):
        self.on_cuda = device.type == "cuda"
        self.recordings = {}
        self.pool = None    # memory of the first graph, in which all later ones work too

    def run(self, name, function, *inputs):
        """What function(*inputs) returns; inputs are tensors."""
        if not self.on_cuda:
            return function(*inputs)
        if name not in self.recordings:
            # The first run is a plain one: it compiles and warms up.
            outputs = function(*inputs)
            self.recordings[name] = None
            return outputs
        if self.recordings[name] is None:
            self.recordings[name] = self.record(function, inputs)
        recording = self.recordings[name]
        for own, given in zip(recording.inputs, inputs):
            assert own.shape == given.shape, (name, own.shape, given.shape)
            own.copy_(given)
        recording.graph.replay()
        return recording.outputs

    def record(self, function, inputs):
        """Record the kernels of function(*inputs). Recording runs none of them."""
        inputs = [x.clone() for x in inputs]
        graph = torch.cuda.CUDAGraph()
        # other threads, such as NCCL's in training, may still call CUDA
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            outputs = function(*inputs)
        self.pool = graph.pool()
        return Recording(graph, inputs, outputs)
