"""
The same computation, faster. The files that define target, drafter, loss, and state import nothing
from here.

    decoding.py      prepare_for_decoding(): joined and packed weights, torch.compile
    prefill.py       several prompts at once on a GPU
    cuda_graph.py    a decoding round is recorded once and replayed
    attention.py     the drafter's attention in training, for GPUs and for CPUs
    training.py      compiled layers and CUDA graphs in training
    cpu.py           packed weights, activation functions, and threads on a CPU
"""
from fast.decoding import prepare_for_decoding as prepare_for_decoding
