"""
The time of a 1-token forward, a 16-token forward, a round, the first token of a prompt (TTFT), the
delta rule, and a training step.

Times are medians of repeats in alternating order, next to transformers with the same weights; the
delta rule also next to flash-linear-attention, if that is installed. `rate` is the rate that a row
reached: bytes of weights per second, or operations. `times_roofline` is the time divided by the
time at the best rate of this machine, which is its copy bandwidth, or the rate of a large product.
Both are measured in the same run. On a GPU `kernel_seconds` is the time that its kernels take; the
rest of the time is the CPU's.

All wall-clock times of a run come first, and all kernel times afterwards. The profiler stays
attached to the process after its first use. From then on, every replay of a CUDA graph takes about
a microsecond longer per kernel: 1.82 instead of 1.39 ms for a step of 396 kernels on an H200.
"""
import copy
from collections.abc import Callable
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F

import train
from benchmarks.common import check_finite, load, print_table, setup_of, text_of
from benchmarks.reference import delta_rule_references, transformers_name, transformers_reference
from benchmarks.scaling import measure_steps, prepare_training
from benchmarks.timing import (copy_bandwidth, device_name, kernel_time, product_rate, seconds_of,
                               time_interleaved)
from delta_rule import chunk_length, gated_delta_rule
from draft_decode import Decoder, round_up_to_power_of_two
from fast.decoding import tf32_if_bfloat16
from sampling import Sampling
from training.flops import delta_rule_operations, prefill_operations

CONTEXT = 256  # tokens before each decoded one
COLUMNS = ("name", "seconds", "times_roofline", "rate", "unit", "reference", "reference_seconds",
           "ratio", "samples_per_s", "mfu", "peak_gb")
KERNEL_COLUMNS = ("name", "seconds", "kernel_seconds", "kernels")


class Case(NamedTuple):
    """A row of the table before it is measured. Functions return their seconds per call."""
    name: str
    work: float                         # bytes of weights to read, or operations
    unit: str                           # of its rate: GB/s or GFLOP/s
    ours: Callable
    calls: int = 1                      # that ours() makes
    reference_name: str | None = None
    reference: Callable | None = None


def run(config):
    parts = {"decoding": decoding_cases, "prefill": prefill_cases, "kernel": kernel_cases}
    for part in config.parts:
        if part not in parts and part != "training":
            raise ValueError(f"parts = {config.parts}: {part!r} is not one of decoding, prefill, "
                             "kernel, training")
    rows = []
    timed = []  # for each row, a function that runs the same work, and its number of calls
    if "training" in config.parts:  # first, because its peak memory must not include other models
        row, step = training_row(config)
        print_table([row], COLUMNS)
        rows.append(row)
        timed.append((step, 1))
    workload = load(config, default_count=1)
    best_rates = {"GB/s": copy_bandwidth(config.device) / 1e9,
                  "GFLOP/s": product_rate(config.device, config.dtype) / 1e9}
    print(f"{config.dtype} on {device_name(config.device)}, at most {text_of(best_rates)}\n")
    with torch.inference_mode():
        for part in config.parts:
            if part == "training":
                continue
            cases = parts[part](config, workload)
            new_rows = [measure(case, best_rates) for case in cases]
            print_table(new_rows, COLUMNS)  # now, because a part can take minutes
            rows += new_rows
            timed += [(torch.inference_mode()(case.ours), case.calls) for case in cases]
    if config.device.startswith("cuda"):
        # now that no wall-clock time remains to be measured, the profiler can slow the process down
        for row, (function, calls) in zip(rows, timed):
            row |= kernel_time(function, calls)
        print_table(rows, KERNEL_COLUMNS)
    return {"command": "speed", "best_rates": best_rates, "rows": rows}, setup_of(config)


# --------------------------------------------------------------------------------------------------
# the table


def measure(case, best_rates):
    """The row of a case without its kernels: timed in alternating order with its reference."""
    functions = {"ours": case.ours}
    if case.reference is not None:
        functions["reference"] = case.reference
    seconds = time_interleaved(functions)
    rate = case.work / median(seconds["ours"]) / 1e9
    row = {"name": case.name, "seconds": median(seconds["ours"]), "rate": rate, "unit": case.unit,
           "times_roofline": best_rates[case.unit] / rate}
    if case.reference is not None:
        ratios = [theirs / own for own, theirs in zip(seconds["ours"], seconds["reference"])]
        row |= {"reference": case.reference_name, "ratio": median(ratios),
                "reference_seconds": median(seconds["reference"])}
    return row


# --------------------------------------------------------------------------------------------------
# decoding


def decoding_cases(config, workload):
    """Forwards of the target alone, next to transformers' forwards with a cache, and a round."""
    target = workload.target
    drafter = workload.drafter
    reference = transformers_reference(target)
    K = drafter.block_size
    calls = 32 if config.device.startswith("cuda") else 8
    target_bytes = weight_bytes(target)
    cases = []
    for length in (1, K):
        cases.append(Case(
            f"{length}-token forward", target_bytes, "GB/s",
            timed_rounds(target, None, length, calls), calls, transformers_name(),
            timed_reference(reference, length, calls)))
    # a round reads the head twice: for the guesses and for their verification
    round_bytes = target_bytes + weight_bytes(drafter) + target.head_weight.nbytes
    cases.append(Case("round of draft and verify", round_bytes, "GB/s",
                      timed_rounds(target, drafter, K, calls), calls))
    return cases


def weight_bytes(model):
    """Bytes of the weights that a forward reads. It reads only a few rows of an embedding, unless
    the embedding is also the head."""
    weights = dict(model.named_parameters())
    if not model.config.tie_word_embeddings:
        weights.pop("embed_tokens.weight", None)
    return sum(weight.nbytes for weight in weights.values())


def timed_rounds(target, drafter, tokens_per_forward, calls, slots=1):
    """A function that times rounds of a Decoder. All slots hold a sequence of CONTEXT tokens."""
    decoder = Decoder(
        target, drafter, length=1024, tokens_per_forward=tokens_per_forward, sampling=Sampling(),
        batch=slots)
    prompts = {slot: example_ids(CONTEXT) for slot in range(slots)}
    decoder.start_sequences(prompts, dict.fromkeys(prompts, 0))

    def seconds_per_round():
        decoder.state.position.fill_(CONTEXT)  # every repeat begins at the end of the prompt
        seconds = seconds_of(decoder.run_round, calls)
        check_finite(all(decoder.is_finite))
        return seconds

    return seconds_per_round


def example_ids(length):
    """Token ids that every vocabulary has."""
    return [i % 100 for i in range(length)]


def timed_reference(reference, length, calls):
    """A function that times transformers' forwards, with a fresh cache in every repeat."""
    ids = torch.tensor([example_ids(CONTEXT + length)], device=reference.device)
    prompt_cache = reference(ids[:, :CONTEXT], use_cache=True).past_key_values
    new_ids = ids[:, CONTEXT:]

    def seconds_per_forward():
        cache = copy.deepcopy(prompt_cache)
        return seconds_of(lambda: reference(new_ids, past_key_values=cache), calls)

    return seconds_per_forward


# --------------------------------------------------------------------------------------------------
# the first token


def prefill_cases(config, workload):
    """TTFT of the target alone: prefill a prompt and choose the next token."""
    target = workload.target
    reference = transformers_reference(target)
    lengths = (512, 4096, 16384) if config.device.startswith("cuda") else (512, 1024)
    values = torch.empty(
        0, target.config.linear_value_head_dim, device=target.embed_tokens.weight.device)
    cases = []
    for length in lengths:
        if length + 512 > target.config.max_position_embeddings:
            continue
        operations = prefill_operations(target, length, chunk_length(values))
        cases.append(Case(
            f"TTFT, {length:,} tokens", operations, "GFLOP/s", timed_ttft(target, length),
            1, transformers_name(), timed_reference_ttft(reference, length)))
    return cases


def timed_ttft(target, length):
    buffer_length = round_up_to_power_of_two(length + 512)  # room for an answer of 496 tokens
    decoder = Decoder(
        target, None, length=buffer_length, tokens_per_forward=16, sampling=Sampling())
    prompt_ids = example_ids(length)

    def start():
        return decoder.start_sequences({0: prompt_ids}, {0: 0})[0]

    start()  # the second call, in the warm-up, is recorded as a graph
    return lambda: seconds_of(start)


def timed_reference_ttft(reference, length):
    ids = torch.tensor([example_ids(length)], device=reference.device)
    return lambda: seconds_of(lambda: reference(ids, logits_to_keep=1).logits.argmax().item())


# --------------------------------------------------------------------------------------------------
# the delta rule

HEADS = 16   # of the 0.8B, for queries, keys and values
WIDTH = 128  # of a head


def kernel_cases(config, workload):
    """The chunked delta rule's forward alone, next to each reference."""
    def timed(kernel, inputs):
        return lambda: seconds_of(lambda: kernel(*inputs))

    def ours(*inputs):
        with tf32_if_bfloat16(workload.target):  # as in the target's own forward
            return gated_delta_rule(*inputs)

    lengths = (512, 2048, 4096, 16384) if config.device.startswith("cuda") else (2048,)
    cases = []
    for length in lengths:
        inputs = delta_rule_inputs(length, config.device, config.dtype)
        operations = delta_rule_operations(length, HEADS, WIDTH, WIDTH, chunk_length(inputs[2]))
        for name, reference in delta_rule_references(config.device).items():
            cases.append(Case(
                f"delta rule, {length:,} tokens", operations, "GFLOP/s",
                timed(ours, inputs), 1, name, timed(reference, inputs)))
    return cases


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


def training_row(config):
    """(row, function that runs one step more): train.py on random samples of its max_length."""
    training_run, result = measure_steps(prepare_training(config), 10)
    return {"name": "training step"} | result, lambda: train.train_step(training_run)
