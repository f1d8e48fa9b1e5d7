"""
What the machine could do at best. A forward of few rows cannot be faster than the reading of its
weights, so the bytes of weights over the machine's own copy bandwidth are the floor of a step and
of a round. Both rates are measured in the same run as what is compared with them.
"""
from statistics import median

import torch

from benchmarks.timing import race, seconds_of


def copy_bandwidth(device):
    """Bytes a second of a copy, those read and those written, between tensors in use."""
    megabytes = 2048 if device.startswith("cuda") else 256
    source = torch.ones(megabytes << 18, device=device)  # of 4 bytes each
    copy = torch.ones_like(source)

    def copy_three_times():
        return seconds_of(lambda: copy.copy_(source), 3)

    seconds = race({"copy": copy_three_times})["copy"]
    return 2 * source.nbytes / median(seconds)


def product_rate(device, dtype):
    """Operations a second of a matrix product of the MLP's widths, with rows enough to be fast."""
    rows = 16384 if device.startswith("cuda") else 1024
    torch_dtype = getattr(torch, dtype)
    a = torch.randn(rows, 1024, device=device).to(torch_dtype)
    b = torch.randn(1024, 3584, device=device).to(torch_dtype)

    def multiply_three_times():
        return seconds_of(lambda: a @ b, 3)

    seconds = race({"product": multiply_three_times})["product"]
    return 2 * rows * 1024 * 3584 / median(seconds)


def weight_bytes(model):
    """Bytes of the weights that a forward reads. Of an embedding it reads a few rows only, unless
    that is also the head."""
    total = 0
    for name, weight in model.named_parameters():
        if name == "embed_tokens.weight" and not model.config.tie_word_embeddings:
            continue
        total += weight.nbytes
    return total


def bytes_read(target, drafter):
    """Bytes of weights that a step of the target alone reads, and a round of drafter and target.
    A round reads the head twice: for the guesses and for their verification."""
    step = weight_bytes(target)
    return {"step": step, "round": step + weight_bytes(drafter) + target.head_weight.nbytes}


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


# ------------------------------------------------------------------------------------------------
# the card: what stands beside a speedup


def card(config, target, drafter, tau, speedup):
    """What ran where, the seconds of a step and of a round that only read their weights, and how
    much of the speedup that such rounds would have at this tau was reached."""
    bandwidth = copy_bandwidth(config.device)
    size = bytes_read(target, drafter)
    ceiling = tau * size["step"] / size["round"]
    return {
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "parameters": {"target": count_parameters(target), "drafter": count_parameters(drafter)},
        "bytes": size, "copy_bytes_per_s": bandwidth,
        "floor_seconds": {name: count / bandwidth for name, count in size.items()},
        "ceiling": ceiling, "share_of_ceiling": speedup / ceiling}


def print_card(card):
    gigabytes = card["copy_bytes_per_s"] / 1e9
    parameters = card["parameters"]
    print_row("device", f"{card['device']}, {card['dtype']}, torch {card['torch']}; "
              f"copies {gigabytes:,.1f} GB/s")
    print_row("parameters", f"{parameters['target']:,} target, {parameters['drafter']:,} drafter")
    for name, label in (("step", "target step"), ("round", "round")):
        megabytes = card["bytes"][name] / 1e6
        milliseconds = 1e3 * card["floor_seconds"][name]
        print_row(label, f"reads {megabytes:,.1f} MB of weights: {milliseconds:.3f} ms at least")
    print_row("ceiling", f"{card['ceiling']:.2f}x at the measured tau, "
              "if both only read their weights")
    print()


def print_row(name, value):
    """A line of a report: what it is, and its value."""
    print(f"{name:20} {value}")
