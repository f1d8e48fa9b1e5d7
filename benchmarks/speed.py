"""
Steps, rounds, prefill, the delta rule and training steps, in milliseconds; each in interleaved
repeats beside transformers on the same weights, and beside the floor that this machine's own
rates set for it: bytes of weights over the copy bandwidth, or operations over the rate of a large
product. Both rates are read in the same run.
"""
import copy
import functools
from statistics import median

import numpy as np
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

import train
from benchmarks.common import load, setup_of
from benchmarks.drafters import untrained_drafter
from benchmarks.machine import bytes_read, copy_bandwidth, device_name, product_rate
from benchmarks.peer import transformers_peer
from benchmarks.timing import clock, race, seconds_of
from configurator import configure
from data.synthetic.prepare import mixed_lengths
from decode_state import DecodeState
from draft_decode import Decoder
from flops import mfu
from sampling import Sampling
from target import gated_delta_rule

PARTS = ("decoding", "prefill", "kernel", "training")


def run(config):
    for part in config.parts:
        if part not in PARTS:
            raise ValueError(f"parts = {config.parts}: {part!r} is none of {', '.join(PARTS)}")
    if config.assumed_tau < 1:
        raise ValueError(f"assumed_tau = {config.assumed_tau}: a round returns at least one token")
    workload = load(config, default_count=1)
    target = workload.target
    bandwidth = copy_bandwidth(config.device)
    rate = product_rate(config.device, config.dtype)
    print(f"{config.dtype} on {device_name(config.device)}, torch {torch.__version__}: "
          f"copies {bandwidth / 1e9:,.0f} GB/s, products {rate / 1e12:.2f} TFLOP/s\n")
    peer = None
    if "decoding" in config.parts or "prefill" in config.parts:
        peer = transformers_peer(target)
    rows = []
    if "decoding" in config.parts:
        rows += decoding_rows(config, workload, peer, bandwidth)
    if "prefill" in config.parts:
        rows += prefill_rows(config, target, peer, rate)
    if "kernel" in config.parts:
        rows += kernel_rows(config)
    if "training" in config.parts:
        rows += training_rows(config, target, rate)
    print_table(rows)
    report = {
        "command": "speed", "target": config.target, "compile": config.compile,
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth, "operations_per_s": rate, "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


def report_row(name, seconds, floor=None, peer_name=None, peer_seconds=None):
    """A row of the report, from the repeats of ours and, if there is one, of the peer; the ratio is
    the median over pairs of repeats."""
    row = {"name": name, "seconds": median(seconds), "floor_seconds": floor,
           "peer": peer_name, "peer_seconds": None, "ratio": None}
    if peer_seconds:
        row["peer_seconds"] = median(peer_seconds)
        row["ratio"] = median([peer / ours for ours, peer in zip(seconds, peer_seconds)])
    return row


def print_table(rows):
    print(f"{'':44} {'ms':>10} {'x floor':>8} {'peer ms':>10} {'ratio':>7}")
    for row in rows:
        line = f"{row['name']:44} {1e3 * row['seconds']:10.3f}"
        if row["floor_seconds"]:
            line += f" {row['seconds'] / row['floor_seconds']:8.2f}"
        else:
            line += f" {'-':>8}"
        if row["peer_seconds"]:
            line += f" {1e3 * row['peer_seconds']:10.3f} {row['ratio']:6.2f}x  {row['peer']}"
        print(line)


# ------------------------------------------------------------------------------------------------
# decoding

CONTEXT = 256  # tokens that all decoding rows begin after


@torch.inference_mode()
def decoding_rows(config, workload, peer, bandwidth):
    """A step of the target alone, a step of a block's rows with all their logits, and a round of
    drafter and target; beside transformers' forwards of as many tokens with its cache. A round
    makes several tokens, so the time of one of them, at a tau that the key names, is what is
    compared with a token of transformers' generate."""
    target = workload.target
    drafter = workload.drafter
    block_size = drafter.block_size
    weight = target.embed_tokens.weight
    slow = weight.device.type == "cpu" and weight.numel() > 1e8
    count = 4 if slow else 32  # calls in a repeat
    tokens = torch.arange(CONTEXT + block_size, device=weight.device)[None] % 100

    seconds = race(our_arms(target, drafter, tokens, count)
                   | peer_arms(peer, tokens, block_size, count))

    size = bytes_read(target, drafter)
    step_floor = size["step"] / bandwidth
    round_floor = size["round"] / bandwidth
    tau = config.assumed_tau
    seconds_a_token = [elapsed / tau for elapsed in seconds["round"]]
    return [
        report_row("target step, one row", seconds["one row"], step_floor,
                   "transformers, forward of one token", seconds["peer, one token"]),
        report_row(f"target step, {block_size} rows", seconds["block"], step_floor,
                   f"transformers, forward of {block_size} tokens", seconds["peer, a block"]),
        report_row("round of draft and verify", seconds["round"], round_floor),
        report_row(f"a token of such rounds, at tau {tau:g}", seconds_a_token, round_floor / tau,
                   "transformers, a token of generate", seconds["peer, generate"])]


def our_arms(target, drafter, tokens, count, slots=1):
    """Functions that time `count` forwards of ours, each of so many sequences."""
    block_size = drafter.block_size
    decoders = {
        "one row": Decoder(target, None, 1024, 1, Sampling(), slots),
        "block": Decoder(target, None, 1024, block_size, Sampling(), slots),
        "round": Decoder(target, drafter, 1024, block_size, Sampling(), slots)}

    def decode(decoder):
        decoder.state.position.fill_(CONTEXT)  # each repeat begins where the prompt ended
        return seconds_of(decoder.next_round, count)

    arms = {}
    for name, decoder in decoders.items():
        for slot in range(slots):
            decoder.prefill(slot, tokens[0, :CONTEXT].tolist())
        arms[name] = functools.partial(decode, decoder)
    return arms


def peer_arms(peer, tokens, block_size, count):
    """Functions that time `count` forwards of transformers, each repeat with a fresh cache."""
    prompt_cache = peer(tokens[:, :CONTEXT], use_cache=True).past_key_values

    def forward(length):
        cache = copy.deepcopy(prompt_cache)
        new_tokens = tokens[:, CONTEXT:CONTEXT + length]
        return seconds_of(lambda: peer(new_tokens, past_key_values=cache), count)

    def generate():
        cache = copy.deepcopy(prompt_cache)
        ids = tokens[:, :CONTEXT + 1]
        elapsed = seconds_of(lambda: peer.generate(
            ids, past_key_values=cache, attention_mask=torch.ones_like(ids), do_sample=False,
            min_new_tokens=count, max_new_tokens=count, pad_token_id=0))
        return elapsed / count

    return {"peer, one token": functools.partial(forward, 1),
            "peer, a block": functools.partial(forward, block_size),
            "peer, generate": generate}


# ------------------------------------------------------------------------------------------------
# prefill


@torch.inference_mode()
def prefill_rows(config, target, peer, rate):
    """Reading a prompt, to the logits of its last token."""
    lengths = (512, 1024, 4096, 16384) if config.device.startswith("cuda") else (512, 1024)
    device = target.embed_tokens.weight.device
    weights = 0
    for name, weight in target.named_parameters():
        if weight.dim() == 2 and "embed" not in name and "head" not in name:
            weights += weight.numel()
    rows = []
    for length in lengths:
        if length + 16 > target.config.max_position_embeddings:
            continue
        tokens = torch.arange(length, device=device)[None] % min(1000, target.config.vocab_size)
        state = DecodeState(target, 1, length + 16)

        def prefill():
            state.reset()
            return seconds_of(lambda: target.prefill(tokens, state))

        def peer_prefill():
            return seconds_of(lambda: peer(tokens, logits_to_keep=1))

        seconds = race({"ours": prefill, "peer": peer_prefill})
        floor = 2 * weights * length / rate
        rows.append(report_row(f"prefill, {length:,} tokens", seconds["ours"], floor,
                               "transformers", seconds["peer"]))
    return rows


# ------------------------------------------------------------------------------------------------
# the delta rule


def kernel_rows(config):
    """The chunked delta rule alone, 16 heads of 128: forward, and forward with backward."""
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule
    lengths = (2048, 16384) if config.device.startswith("cuda") else (2048,)
    rows = []
    for length in lengths:
        inputs = delta_rule_inputs(length, config.device)

        def forward(kernel):
            with torch.no_grad():
                kernel(*inputs)

        def forward_and_backward(kernel):
            output = kernel(*inputs)[0]
            torch.autograd.grad(output.sum(), inputs)

        for name, mode in (("forward", forward), ("forward and backward", forward_and_backward)):
            def seconds_with(kernel):
                return seconds_of(lambda: mode(kernel))

            seconds = race({
                "ours": functools.partial(seconds_with, gated_delta_rule),
                "peer": functools.partial(seconds_with, torch_chunk_gated_delta_rule)})
            rows.append(report_row(f"delta rule, {length:,} tokens, {name}", seconds["ours"], None,
                                   "transformers", seconds["peer"]))
    return rows


def delta_rule_inputs(length, device):
    """Random q, k, v, g, beta: unit queries and keys, g below 0, beta from 0 to 1."""
    generator = torch.Generator(device).manual_seed(0)
    vectors = []
    for _ in range(3):
        vectors.append(torch.randn(1, length, 16, 128, device=device, generator=generator))
    q, k, v = vectors
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    beta = torch.rand(1, length, 16, device=device, generator=generator)
    decay = torch.rand(1, length, 16, device=device, generator=generator)
    return [x.requires_grad_() for x in (q, k, v, -decay, beta)]


# ------------------------------------------------------------------------------------------------
# training


def training_rows(config, target, rate):
    """Whole training steps on random rows, of a drafter of Phase 1.2's shape if the target is the
    0.8B: on a GPU rows of 3,072 tokens, and of mixed lengths like those of Phase 1.2's data,
    1,200 on average; on a CPU one small row a step. The floor is a step's operations over the
    rate of a large product. What is compiled comes last, as the layers stay so."""
    if not config.device.startswith("cuda"):
        keys = {"attention": "grouped", "num_anchors": 32, "batch_size": 1, "accumulation": 1}
        return [training_row(config, target, rate, "512 tokens, 32 anchors", [512] * 16, keys)]
    full = [3072] * 64
    generator = np.random.default_rng(0)
    mixed = mixed_lengths(256, generator)
    rows = []
    for name, lengths, keys in (
            ("3,072 tokens", full, {}),
            ("3,072 tokens, guesses_at_once 4096", full, {"guesses_at_once": 4096}),
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
        for micro in range(train_config.accumulation):
            numbers = run.micro_batches.sample_numbers(run.step * train_config.accumulation + micro)
            rows += len(numbers)
            tokens += sum(lengths[number] for number in numbers)
        start = clock()
        _, sums = train.train_step(run)
        seconds.append(clock() - start)
        operations += float(sums.operations)

    rate_reached = operations / sum(seconds)
    row = report_row(f"training step, {name}", seconds, operations / len(seconds) / rate)
    row |= {"samples_per_s": rows / sum(seconds), "tokens_per_s": int(tokens) / sum(seconds),
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
