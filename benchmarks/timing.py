"""
Clocks for measurements that can be compared: what is compared runs in one process, in turns,
after a warm-up.
"""
import sys
import time

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm


def clock():
    """Seconds, read when the device has done all of its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def seconds_of(function, count=1):
    """Seconds of one call of a function, on average over `count` calls."""
    start = clock()
    for _ in range(count):
        function()
    return (clock() - start) / count


def kernel_time(function, count):
    """Seconds that a CUDA device works on one call, and how many kernels these are: averages over
    `count` calls. Copies and fills are kernels here. None where the profiler sees no kernel.

    An event of the device is one kernel that ran, also if a CUDA graph launched it. Launches and
    waits are events of the CPU and do not count. Neither do annotations: they span kernels that
    are counted already.
    """
    for _ in range(2):  # the first start of the tracer may miss kernels, so the second one counts
        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            for _ in range(count):
                function()
            clock()  # the device has done all of it before the tracer stops
    microseconds = 0.0
    kernels = 0
    for event in profiler.events():
        if event.device_type == DeviceType.CUDA and not event.is_user_annotation:
            microseconds += event.self_device_time_total
            kernels += 1
    if kernels == 0:
        return None
    return microseconds / 1e6 / count, round(kernels / count)


def race(arms, repeats=5):
    """Runs timed functions in turns. arms: {name: function that returns seconds}.

    Returns {name: [seconds of each repeat]}; a first one is the warm-up and does not count.
    """
    seconds = {name: [] for name in arms}
    for repeat in progress(range(repeats + 1), unit="repeat"):
        for name in in_turn(arms, repeat):
            elapsed = arms[name]()
            if repeat > 0:
                seconds[name].append(elapsed)
    return seconds


def in_turn(names, turn):
    """Names in their order or, every second turn, in reverse, so that none always goes first."""
    names = list(names)
    if turn % 2 == 0:
        names.reverse()
    return names


def progress(items, unit="prompt"):
    """The items, with a progress bar where a person looks on."""
    return tqdm(items, unit=unit, leave=False, disable=not sys.stderr.isatty())
