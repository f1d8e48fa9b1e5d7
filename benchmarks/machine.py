"""
The best rates of the machine. A short forward cannot be faster than reading its weights, so its
shortest time is the bytes of the weights divided by the copy bandwidth.
"""
from statistics import median

import torch

from benchmarks.timing import seconds_of, time_interleaved


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


def bytes_read(target, drafter):
    """Bytes of weights that a forward of the target alone reads, and a round of drafter and target.
    A round reads the head twice: for the guesses and for their verification."""
    step = weight_bytes(target)
    return {"step": step, "round": step + weight_bytes(drafter) + target.head_weight.nbytes}


def weight_bytes(model):
    """Bytes of the weights that a forward reads. It reads only a few rows of an embedding, unless
    the embedding is also the head."""
    total = 0
    for name, weight in model.named_parameters():
        if name == "embed_tokens.weight" and not model.config.tie_word_embeddings:
            continue
        total += weight.nbytes
    return total


def device_name(device):
    if device.startswith("cuda"):
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} CPU threads"


# --------------------------------------------------------------------------------------------------
# the card, which is printed with every speedup


def card(config, target, drafter, tau, speedup):
    """The machine, the shortest possible times, and the fraction of the best speedup at this
    tau."""
    bandwidth = copy_bandwidth(config.device)
    size = bytes_read(target, drafter)
    ceiling = tau * size["step"] / size["round"]
    return {
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "parameters": {"target": count_parameters(target), "drafter": count_parameters(drafter)},
        "bytes": size, "copy_bytes_per_s": bandwidth,
        "floor_seconds": {name: count / bandwidth for name, count in size.items()},
        "ceiling": ceiling, "share_of_ceiling": speedup / ceiling}


def count_parameters(model):
    return sum(p.numel() for p in model.parameters())


def print_card(card):
    print_row("device", f"{card['device']}, {card['dtype']}, torch {card['torch']}; "
              f"copies {card['copy_bytes_per_s'] / 1e9:,.1f} GB/s")
    for name, label in (("step", "target forward"), ("round", "round")):
        megabytes = card["bytes"][name] / 1e6
        milliseconds = 1e3 * card["floor_seconds"][name]
        print_row(label, f"reads {megabytes:,.1f} MB of weights: {milliseconds:.3f} ms at least")
    print_row("ceiling", f"{card['ceiling']:.2f}x at the measured tau, "
              "if both only read their weights\n")


def print_row(name, value):
    """A line of a report."""
    print(f"{name:20} {value}")
