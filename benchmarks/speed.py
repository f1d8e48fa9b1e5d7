"""
The time of a 1-token forward, a 16-token forward, a round, the first token of a prompt (TTFT), the
delta rule, and a training step.

Times are medians of repeats in alternating order, next to transformers with the same weights; the
delta rule also next to flash-linear-attention, if that is installed. Each row also has the
roofline, which is the time at the best rate of this machine: bytes of weights at the copy
bandwidth, or operations at the rate of a large product. Both rates are measured in the same run.
`rate` is the rate that the row reached. On a GPU `kernels` is the time that its kernels take; the
rest of the time is the CPU's.
"""
import copy
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train
from benchmarks.common import load, setup_of
from benchmarks.machine import bytes_read, copy_bandwidth, device_name, product_rate
from benchmarks.reference import (delta_rule_references, transformers_name,
                                  transformers_reference)
from benchmarks.scaling_worker import WARM_UP_STEPS, make_samples, measure_run
from benchmarks.timing import kernel_time, seconds_of, time_interleaved
from delta_rule import chunk_length, gated_delta_rule
from draft_decode import Decoder, round_up_to_power_of_two
from sampling import Sampling
from training.flops import delta_rule_operations, prefill_operations

PARTS = ("decoding", "prefill", "kernel", "training")
CONTEXT = 256  # tokens before each decoded one


class RooflineCost(NamedTuple):
    """The work of a row, and the best rate of this machine for it."""
    amount: float
    unit: str           # "bytes" or "operations"
    best_rate: float    # bytes or operations per second


class Case(NamedTuple):
    """A row of the table before it is measured. Functions return their seconds per call."""
    name: str
    cost: RooflineCost
    ours: Callable
    calls: int = 1                      # that ours() makes
    reference: Callable | None = None
    reference_name: str | None = None


def run(config):
    for part in config.parts:
        if part not in PARTS:
            raise ValueError(f"parts = {config.parts}: {part!r} is not one of {', '.join(PARTS)}")
    workload = load(config, default_count=1)
    bandwidth = copy_bandwidth(config.device)
    rate = product_rate(config.device, config.dtype)
    print(f"{config.dtype} on {device_name(config.device)}, torch {torch.__version__}: "
          f"copies {bandwidth / 1e9:,.0f} GB/s, products {rate / 1e12:.2f} TFLOP/s\n")
    reference = None
    if "decoding" in config.parts or "prefill" in config.parts:
        reference = transformers_reference(workload.target)
    rows = []
    for part in config.parts:
        if part == "decoding":
            rows_of_part = decoding_rows(config, workload, reference, bandwidth)
        elif part == "prefill":
            rows_of_part = prefill_rows(config, workload.target, reference, rate)
        elif part == "kernel":
            rows_of_part = kernel_rows(config, rate)
        else:
            rows_of_part = training_rows(config, rate)
        print_table(rows_of_part)  # now, because a part can take minutes
        rows += rows_of_part
    report = {
        "command": "speed", "target": config.target, "compile": config.compile,
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth, "operations_per_s": rate, "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


# --------------------------------------------------------------------------------------------------
# the table


def measure(cases, device):
    """Time all cases and their references in alternating order. Returns a row for each case."""
    functions = {}
    for number, case in enumerate(cases):
        functions["ours", number] = case.ours
        if case.reference is not None:
            functions["reference", number] = case.reference
    seconds = time_interleaved(functions)
    rows = []
    for number, case in enumerate(cases):
        ours = seconds["ours", number]
        row = new_row(case.name, case.cost, ours)
        if case.reference is not None:
            reference = seconds["reference", number]
            row["reference"] = case.reference_name
            row["reference_seconds"] = median(reference)
            row["ratio"] = median([theirs / own for own, theirs in zip(ours, reference)])
        if device.startswith("cuda"):
            row |= kernel_time(case.ours, case.calls)
        rows.append(row)
    return rows


def new_row(name, cost, seconds):
    """seconds: those of each repeat."""
    return {"name": name, "seconds": median(seconds),
            "roofline_seconds": cost.amount / cost.best_rate,
            f"{cost.unit}_per_s": cost.amount / median(seconds)}


def print_table(rows):
    print(f"{'':44} {'ms':>10} {'kernels':>17} {'x roofline':>10} {'rate':>14} {'reference':>11} "
          f"{'ratio':>7}")
    for row in rows:
        times_roofline = row["seconds"] / row["roofline_seconds"]
        kernels = "-"
        if "kernel_seconds" in row:
            kernels = f"{1e3 * row['kernel_seconds']:.3f} ({row['kernels']:,})"
        line = (f"{row['name']:44} {1e3 * row['seconds']:10.3f} {kernels:>17} "
                f"{times_roofline:10.2f} {rate_text(row):>14}")
        if "reference" in row:
            milliseconds = 1e3 * row["reference_seconds"]
            line += f" {milliseconds:11.3f} {row['ratio']:6.2f}x  {row['reference']}"
        print(line)
    print(flush=True)


def rate_text(row):
    """The rate that a row reached, in GB or 10^12 operations per second."""
    if "bytes_per_s" in row:
        return f"{row['bytes_per_s'] / 1e9:,.2f} GB/s"
    return f"{row['operations_per_s'] / 1e12:,.2f} TFLOP/s"


# --------------------------------------------------------------------------------------------------
# decoding


@torch.inference_mode()
def decoding_rows(config, workload, reference, bandwidth):
    """Forwards of the target alone, next to transformers' forwards with a cache, and a round."""
    target = workload.target
    drafter = workload.drafter
    K = drafter.block_size
    calls = 32 if config.device.startswith("cuda") else 8
    size = bytes_read(target, drafter)
    name = transformers_name()
    cases = []
    for length in (1, K):
        cases.append(Case(
            f"{length}-token forward", RooflineCost(size["step"], "bytes", bandwidth),
            timed_rounds(target, None, length, calls), calls,
            timed_reference(reference, length, calls), name))
    cases.append(Case(
        "round of draft and verify", RooflineCost(size["round"], "bytes", bandwidth),
        timed_rounds(target, drafter, K, calls), calls))
    return measure(cases, config.device)


def timed_rounds(target, drafter, tokens_per_forward, calls, slots=1):
    """A function that times rounds of a Decoder. All slots hold a sequence of CONTEXT tokens."""
    decoder = Decoder(
        target, drafter, length=1024, tokens_per_forward=tokens_per_forward, sampling=Sampling(),
        batch=slots)
    prompts = {slot: example_ids(CONTEXT) for slot in range(slots)}
    decoder.start_sequences(prompts, dict.fromkeys(prompts, 0))

    def seconds_per_round():
        decoder.state.position.fill_(CONTEXT)  # every repeat begins at the end of the prompt
        return seconds_of(decoder.run_round, calls)

    return seconds_per_round


def example_ids(length):
    """Token ids that every vocabulary has."""
    return [i % 100 for i in range(length)]


def timed_reference(reference, length, calls):
    """A function that times forwards of transformers, with a fresh cache in every repeat."""
    ids = torch.tensor([example_ids(CONTEXT + length)], device=reference.device)
    prompt_cache = reference(ids[:, :CONTEXT], use_cache=True).past_key_values
    new_ids = ids[:, CONTEXT:]

    def seconds_per_forward():
        cache = copy.deepcopy(prompt_cache)
        return seconds_of(lambda: reference(new_ids, past_key_values=cache), calls)

    return seconds_per_forward


# --------------------------------------------------------------------------------------------------
# the first token


@torch.inference_mode()
def prefill_rows(config, target, reference, rate):
    """TTFT of the target alone: prefill a prompt and choose the next token."""
    lengths = (512, 4096, 16384) if config.device.startswith("cuda") else (512, 1024)
    values = torch.empty(
        0, target.config.linear_value_head_dim, device=target.embed_tokens.weight.device)
    name = transformers_name()
    cases = []
    for length in lengths:
        if length + 512 > target.config.max_position_embeddings:
            continue
        operations = prefill_operations(target, length, chunk_length(values))
        cases.append(Case(
            f"TTFT, {length:,} tokens", RooflineCost(operations, "operations", rate),
            timed_ttft(target, length), reference=timed_reference_ttft(reference, length),
            reference_name=name))
    return measure(cases, config.device)


def timed_ttft(target, length):
    buffer_length = round_up_to_power_of_two(length + 512)  # room for an answer of 496 tokens
    decoder = Decoder(
        target, None, length=buffer_length, tokens_per_forward=16, sampling=Sampling())
    prompt_ids = example_ids(length)

    def start():
        decoder.start_sequences({0: prompt_ids}, {0: 0})

    start()  # the second call, in the warm-up, is recorded as a graph
    return lambda: seconds_of(start)


def timed_reference_ttft(reference, length):
    ids = torch.tensor([example_ids(length)], device=reference.device)
    return lambda: seconds_of(lambda: reference(ids, logits_to_keep=1).logits.argmax().item())


# --------------------------------------------------------------------------------------------------
# the delta rule

HEADS = 16   # of the 0.8B, for queries, keys and values
WIDTH = 128  # of a head


@torch.no_grad()
def kernel_rows(config, rate):
    """The forward of the chunked delta rule alone, next to each reference."""
    lengths = (512, 2048, 4096, 16384) if config.device.startswith("cuda") else (2048,)
    cases = []
    for length in lengths:
        inputs = delta_rule_inputs(length, config.device, config.dtype)
        operations = delta_rule_operations(length, HEADS, WIDTH, WIDTH, chunk_length(inputs[2]))
        cost = RooflineCost(operations, "operations", rate)
        for name, reference in delta_rule_references(config.device).items():
            cases.append(Case(
                f"delta rule, {length:,} tokens", cost, timed_kernel(gated_delta_rule, inputs),
                reference=timed_kernel(reference, inputs), reference_name=name))
    return measure(cases, config.device)


def timed_kernel(kernel, inputs):
    return lambda: seconds_of(lambda: kernel(*inputs))


def delta_rule_inputs(length, device, dtype):
    """Random q, k, v, g, beta: unit queries and keys, g below 0, beta from 0 to 1. In a model of
    `dtype` all have this dtype except g, which is fp32."""
    generator = torch.Generator(device).manual_seed(0)
    shape = (1, length, HEADS, WIDTH)
    q, k, v = [torch.randn(shape, device=device, generator=generator) for _ in range(3)]
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    beta = torch.rand(shape[:3], device=device, generator=generator)
    decay = torch.rand(shape[:3], device=device, generator=generator)
    dtype = getattr(torch, dtype)
    return q.to(dtype), k.to(dtype), v.to(dtype), -decay, beta.to(dtype)


# --------------------------------------------------------------------------------------------------
# training


def training_rows(config, rate):
    """Steps of a run of train.py on random samples of its max_length."""
    flags = [config.recipe, f"--target={config.target}", f"--device={config.device}",
             f"--dtype={config.dtype}", f"--out_dir={config.out_dir}/training-dflash",
             f"--data={config.out_dir}/samples"]
    if config.compile:
        flags.append("--compile")
    make_samples(config.target, f"{config.out_dir}/samples", flags)
    run, result = measure_run({"flags": flags, "steps": 10, "save_at": None})
    steps = result["steps"][WARM_UP_STEPS:]
    operations = sum(step["operations"] for step in steps) / len(steps)
    row = new_row("training step", RooflineCost(operations, "operations", rate),
                  [step["seconds"] for step in steps])
    row |= {"samples_per_s": result["samples_per_s"], "mfu": result["mfu"]}
    print(f"{row['samples_per_s']:.2f} samples/s")
    if config.device != "cpu":
        row |= kernel_time(lambda: train.train_step(run))
    return [row]
