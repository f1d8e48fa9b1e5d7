"""
Clocks for measurements that can be compared: what is compared runs in one process, in turns,
after a warm-up.
"""
import sys
import time

import torch
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
