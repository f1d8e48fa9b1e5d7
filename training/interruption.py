"""
Ctrl-C and SIGTERM during training: every process first ends its step.

If a process dies, torchrun sends SIGTERM to the others on its node. They can be stuck in NCCL,
which waits for the dead process. Then each of them prints one line and exits.
"""
import contextlib
import os
import shlex
import signal
import socket
import sys
import threading

import torch

from formats.files import printable
from training.parallel import sum_over_ranks, world_size

# seconds that a step has to finish after SIGTERM; torchrun sends SIGKILL after 30
PATIENCE_S = 20.0


@contextlib.contextmanager
def stop_signals():
    """Yields a list that collects SIGTERM and Ctrl-C. They do not end the process.

    Python runs no signal handler while the main thread waits in NCCL. But Python writes the number
    of each signal into a socket immediately. Under torchrun a second thread reads the socket.
    """
    received = []

    def receive(number, frame):
        received.append(number)

    previous = {}
    for number in (signal.SIGTERM, signal.SIGINT):
        previous[number] = signal.signal(number, receive)
    reader, writer = socket.socketpair()
    writer.setblocking(False)
    signal.set_wakeup_fd(writer.fileno())
    has_ended = threading.Event()
    if "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=end_if_stuck, args=(reader, has_ended), daemon=True).start()
    try:
        yield received
    finally:
        has_ended.set()
        signal.set_wakeup_fd(-1)
        writer.close()  # the thread reads the end of the stream and returns
        for number, handler in previous.items():
            signal.signal(number, handler)


def end_if_stuck(reader, has_ended):
    """Wait for SIGTERM, then end the process unless the step ends in PATIENCE_S seconds."""
    number = reader.recv(1)
    while number not in (b"", bytes([signal.SIGTERM])):
        number = reader.recv(1)
    if not has_ended.wait(PATIENCE_S):
        print(f"error: process {os.environ['RANK']} got SIGTERM, but its step did not finish in "
              f"{PATIENCE_S:.0f} s, probably because another process died. Continue with --resume",
              file=sys.stderr, flush=True)
        os._exit(1)


def any_rank_received(received, device):
    """Whether any process received a signal; all processes get the same answer."""
    if world_size() == 1:
        return bool(received)  # without waiting for the GPU
    return bool(sum_over_ranks(torch.tensor(len(received), device=device)))


def how_to_resume(step, folder):
    """The message of a stopped run, with its own command and --resume."""
    words = [word for word in sys.argv[1:] if word != "--resume"]
    arguments = shlex.join([*words, "--resume"])
    command = "python" if world_size() == 1 else "torchrun ... (same options)"
    return printable(f"stopped at step {step}, checkpoint saved to {folder}. "
                     f"To resume: {command} train.py {arguments}")
