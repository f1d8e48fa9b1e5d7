"""
Ctrl-C and SIGTERM during training: the step under way ends first, in every process.
"""
import contextlib
import signal

import torch

from parallel import sum_over_ranks


@contextlib.contextmanager
def stop_signals():
    """SIGTERM and Ctrl-C are collected in the list that this yields, instead of ending the run."""
    received = []

    def receive(number, frame):
        received.append(number)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, receive)
    try:
        yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def any_rank_received(received, device):
    """Whether a signal reached any process; the same answer in all of them."""
    return bool(sum_over_ranks(torch.tensor(len(received), device=device)))
