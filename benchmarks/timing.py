"""
Clocks for comparisons, and the best rates of this machine. All functions that are compared run in
one process, in alternating order, after a warm-up.
"""
import sys
import time
from statistics import median

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
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


def time_interleaved(functions, repeats=5):
    """Run functions in alternating order. functions: {name: function that returns its own seconds}.

    Returns {name: [seconds of each repeat]}. One more repeat before them is the warm-up.
    """
    seconds = {name: [] for name in functions}
    for repeat in progress(range(repeats + 1), unit="repeat"):
        for name in alternating_order(functions, repeat):
            elapsed = functions[name]()
            if repeat > 0:
                seconds[name].append(elapsed)
    return seconds


def alternating_order(names, turn):
    """The names in their order, or reversed in every second turn, so that none is always first."""
    names = list(names)
    if turn % 2 == 0:
        names.reverse()
    return names


def progress(items, unit="prompt"):
    """The items, with a progress bar if the output is a terminal."""
    return tqdm(items, unit=unit, leave=False, disable=not sys.stderr.isatty())


def kernel_time(function, count=1):
    """{"kernel_seconds", "kernels"} per call, if function() makes `count` calls. Empty if the
    profiler sees no kernel.

    Measure all wall-clock times before this: the profiler slows the rest of the process down, see
    speed.py.

    Copies and fills count as kernels. So do the kernels of a CUDA graph. Launches are CPU events
    and do not count. Annotations do not count because they span kernels that count already.
    """
    for _ in range(2):  # the first run of the profiler can miss kernels, so only the second counts
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            function()
            clock()  # wait for the device before the profiler stops
    microseconds = 0.0
    kernels = 0
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            microseconds += event.self_device_time_total
            kernels += 1
    if kernels == 0:
        return {}
    return {"kernel_seconds": microseconds / 1e6 / count, "kernels": round(kernels / count)}


# --------------------------------------------------------------------------------------------------
# the machine


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def copy_bandwidth(device):
    """Bytes per second of a copy, read and written, between two tensors in use."""
    megabytes = 2048 if device.startswith("cuda") else 256
    source = torch.ones(megabytes << 18, device=device)  # of 4 bytes each
    copy = torch.ones_like(source)
    return 2 * source.nbytes / median_seconds(lambda: copy.copy_(source))


def product_rate(device, dtype):
    """Operations per second of a large matrix product with the widths of the MLP of the 0.8B."""
    rows = 16384 if device.startswith("cuda") else 1024
    torch_dtype = getattr(torch, dtype)
    a = torch.randn(rows, 1024, device=device).to(torch_dtype)
    b = torch.randn(1024, 3584, device=device).to(torch_dtype)
    return 2 * rows * 1024 * 3584 / median_seconds(lambda: a @ b)


def median_seconds(function):
    """Median seconds per call of a function, over five repeats of three calls."""
    return median(time_interleaved({"it": lambda: seconds_of(function, 3)})["it"])
