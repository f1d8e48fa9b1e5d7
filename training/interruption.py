"""
Ctrl-C and SIGTERM during training: the step under way ends first, in every process.
"""
import contextlib
import os
import signal
import sys
import threading

import torch

from training.parallel import sum_over_ranks, world_size

# torchrun sends SIGTERM when another process has died, and SIGKILL 30 seconds later
PATIENCE_S = 20.0


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
        with end_if_stuck():
            yield received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def end_if_stuck():
    """Under torchrun: a process that is still here long after SIGTERM says so in one line and ends.

    It waits in NCCL for a process that has died. Python runs no handler of a signal meanwhile. But
    the number of the signal is written into a pipe at once, and a thread that reads the pipe can
    act.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        yield
        return
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    previous_writer = signal.set_wakeup_fd(writer)
    has_ended = threading.Event()
    threading.Thread(target=watch, args=(reader, has_ended), daemon=True).start()
    try:
        yield
    finally:
        has_ended.set()
        signal.set_wakeup_fd(previous_writer)
        os.close(writer)  # then the thread finds the end of the pipe


def watch(reader, has_ended):
    """Wait for SIGTERM to come through the pipe; end the process if it does not end by itself."""
    with open(reader, "rb", buffering=0) as pipe:
        number = pipe.read(1)
        while number not in (b"", bytes([signal.SIGTERM])):
            number = pipe.read(1)
        if has_ended.wait(PATIENCE_S):
            return
    sys.stderr.write(
        f"error: process {os.environ['RANK']} was told to end, and its step does not come to an "
        "end, as if another process had died: --resume goes on from the last checkpoint\n")
    sys.stderr.flush()
    os._exit(1)


def any_rank_received(received, device):
    """Whether a signal reached any process; the same answer in all of them."""
    if world_size() == 1:
        return bool(received)  # without a word from the GPU, which may be busy with the step
    return bool(sum_over_ranks(torch.tensor(len(received), device=device)))
