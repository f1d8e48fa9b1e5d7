"""
Clocks for comparisons, and the best rates of this machine. All functions that are compared run in
one process, in alternating order, after a warm-up.
"""
import sys
import time
from statistics import median

import torch
from tqdm import tqdm


def clock():
    """Seconds, read after the device has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, count=1):
    """Seconds per call of a function, the mean of `count` calls."""
    began = clock()
    for _ in range(count):
        function()
    return (clock() - began) / count


def median_seconds(functions, repeats=5):
    """Run functions in alternating order. functions: {name: function that returns its own seconds}.

    Returns {name: median over the repeats}. One more repeat before them is the warm-up.
    """
    seconds = {name: [] for name in functions}
    for repeat in progress(range(repeats + 1), unit="repeat"):
        for name in alternating_order(functions, repeat):
            elapsed = functions[name]()
            if repeat > 0:
                seconds[name].append(elapsed)
    return {name: median(seconds[name]) for name in functions}


def alternating_order(names, turn):
    """The names in their order, or reversed in every second turn, so that none is always first."""
    names = list(names)
    if turn % 2 == 0:
        names.reverse()
    return names


def progress(items, unit="prompt"):
    """The items, with a progress bar if the output is a terminal."""
    return tqdm(items, unit=unit, leave=False, disable=not sys.stderr.isatty())


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def best_rates(device, dtype):
    """{"GB/s": of a copy, read and written, "GFLOP/s": of a large matrix product with the widths of
    the MLP of the 0.8B}."""
    is_gpu = device.startswith("cuda")
    megabytes = 2048 if is_gpu else 256
    rows = 16384 if is_gpu else 1024
    source = torch.ones(megabytes << 18, device=device)  # of 4 bytes each
    copy = torch.ones_like(source)
    a = torch.randn(rows, 1024, device=device).to(getattr(torch, dtype))
    b = torch.randn(1024, 3584, device=device).to(a.dtype)
    seconds = median_seconds({
        "copy": lambda: seconds_of(lambda: copy.copy_(source), 3),
        "product": lambda: seconds_of(lambda: a @ b, 3)})
    return {"GB/s": 2 * source.nbytes / seconds["copy"] / 1e9,
            "GFLOP/s": 2 * rows * 1024 * 3584 / seconds["product"] / 1e9}
