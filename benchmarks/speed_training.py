"""
The training rows of `python bench.py speed`: whole steps of train.py on random rows, against the
arithmetic that they make.
"""
import numpy as np
from torch._dynamo.utils import counters

import train
from benchmarks.drafters import untrained_drafter
from benchmarks.speed_table import Work, report_row
from benchmarks.timing import clock
from configurator import configure
from data.synthetic.prepare import mixed_lengths
from training.flops import mfu


def training_rows(config, target, rate):
    """Whole training steps on random rows, of a drafter of Phase 1.2's shape if the target is the
    0.8B: on a GPU rows of 3,072 tokens, and of mixed lengths like those of Phase 1.2's data,
    1,200 on average; on a CPU one small row a step. The floor is a step's operations over the
    rate of a large product. What is compiled comes last, as the layers stay so."""
    if not config.device.startswith("cuda"):
        keys = {"attention": "grouped", "num_anchors": 32, "batch_size": 1, "grad_accum_steps": 1}
        return [training_row(config, target, rate, "512 tokens, 32 anchors", [512] * 16, keys)]
    full = [3072] * 64
    generator = np.random.default_rng(0)
    mixed = mixed_lengths(256, generator)
    rows = []
    for name, lengths, keys in (
            ("3,072 tokens", full, {}),
            ("3,072 tokens, loss_chunk_size 4096", full, {"loss_chunk_size": 4096}),
            ("mixed lengths", mixed, {}),
            ("3,072 tokens, grouped attention", full, {"attention": "grouped"}),
            ("3,072 tokens, --compile", full, {"compile": True}),
            ("mixed lengths, --compile", mixed, {"compile": True})):
        rows.append(training_row(config, target, rate, name, lengths, keys))
    return rows


def training_row(config, target, rate, name, lengths, keys):
    """Seconds, samples and tokens a second of training steps on random rows of these lengths; keys:
    of train.py, where they are not those of Phase 1.2."""
    train_config = configure(vars(train), [])
    train_config.device = config.device
    train_config.dtype = config.dtype
    for key, value in keys.items():
        setattr(train_config, key, value)
    run = training_run(train_config, target, lengths)

    # the warm-up: every length is compiled, every kernel loaded
    start = clock()
    if len(set(lengths)) > 1:
        train.warm_up(run)
    for _ in range(2):
        train.train_step(run)
    warm_up_seconds = clock() - start
    graphs = counters["stats"]["unique_graphs"]

    small = train_config.attention == "grouped"  # that takes ten seconds a step, even on a GPU
    seconds = []
    rows = 0
    tokens = 0
    operations = 0
    for _ in range(2 if small else 8):
        for micro in range(train_config.grad_accum_steps):
            numbers = run.micro_batches.sample_numbers(run.step * train_config.grad_accum_steps + micro)
            rows += len(numbers)
            tokens += sum(lengths[number] for number in numbers)
        start = clock()
        _, sums = train.train_step(run)
        seconds.append(clock() - start)
        operations += float(sums.operations)

    rate_reached = operations / sum(seconds)
    work = Work(operations / len(seconds), "operations", rate)
    row = report_row(f"training step, {name}", seconds, work)
    row |= {"operations_per_s": rate_reached,
            "samples_per_s": rows / sum(seconds), "tokens_per_s": int(tokens) / sum(seconds),
            "mfu": mfu(rate_reached, config.device, config.dtype),
            "recompiled": counters["stats"]["unique_graphs"] - graphs,
            "warm_up_s": warm_up_seconds}
    share_of_peak = f"{row['mfu']:.1%} MFU, " if row["mfu"] else ""
    print(f"{row['name']}: {row['samples_per_s']:.2f} samples/s, {row['tokens_per_s']:,.0f} "
          f"tokens/s without padding, {share_of_peak}{row['recompiled']} recompiled after "
          f"{warm_up_seconds:.0f} s of warm-up", flush=True)
    return row


def training_run(train_config, target, lengths):
    """A run of train.py on random rows, of which the second part is supervised, as an answer is."""
    generator = np.random.default_rng(0)
    rows = []
    for length in lengths:
        tokens = generator.integers(0, target.config.vocab_size, length)
        supervised = np.arange(length) >= min(100, length // 2)
        rows.append((tokens, supervised))
    train.deterministic_kernels()
    return train.new_run(train_config, target, untrained_drafter(target), rows)
