"""
Steps, rounds, the time to the first token, the delta rule and training steps, in milliseconds; each
in interleaved repeats beside transformers on the same weights, the delta rule also beside
flash-linear-attention where that is installed. Each stands beside the floor that this machine's own
rates set for it: bytes of weights over the copy bandwidth, or operations over the rate of a large
product. Both rates are read in the same run. The column after it is the rate that was reached.
"""
import copy
import functools
import textwrap

import torch
import torch.nn.functional as F

from benchmarks.common import load, setup_of
from benchmarks.machine import bytes_read, copy_bandwidth, device_name, product_rate
from benchmarks.peer import delta_rule_peers, transformers_name, transformers_peer
from benchmarks.speed_table import Work, print_table, report_row
from benchmarks.speed_training import training_rows
from benchmarks.timing import kernel_time, race, seconds_of
from draft_decode import Decoder, round_up_to_power_of_two
from training.flops import delta_rule_operations, prefill_operations
from sampling import Sampling
from delta_rule import chunk_length, gated_delta_rule

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
    for part in config.parts:
        if part == "decoding":
            rows_of_part = decoding_rows(config, workload, peer, bandwidth)
        elif part == "prefill":
            rows_of_part = prefill_rows(config, workload, peer, rate)
        elif part == "kernel":
            rows_of_part = kernel_rows(config, rate)
        else:
            rows_of_part = training_rows(config, target, rate)
        print_table(rows_of_part)  # at once, as a part may take minutes
        print(flush=True)
        rows += rows_of_part
    report = {
        "command": "speed", "target": config.target, "compile": config.compile,
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth, "operations_per_s": rate, "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


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

    ours = our_arms(target, drafter, tokens, count)
    seconds = race(ours | peer_arms(peer, tokens, block_size, count))

    size = bytes_read(target, drafter)
    step = Work(size["step"], "bytes", bandwidth)
    whole_round = Work(size["round"], "bytes", bandwidth)
    tau = config.assumed_tau
    token = Work(size["round"] / tau, "bytes", bandwidth)
    seconds_a_token = [elapsed / tau for elapsed in seconds["round"]]
    name = transformers_name()
    rows = [
        report_row("target step, one row", seconds["one row"], step,
                   f"{name}, forward of one token", seconds["peer, one token"]),
        report_row(f"target step, {block_size} rows", seconds["block"], step,
                   f"{name}, forward of {block_size} tokens", seconds["peer, a block"]),
        report_row("round of draft and verify", seconds["round"], whole_round),
        report_row(f"a token of such rounds, at tau {tau:g}", seconds_a_token, token,
                   f"{name}, a token of generate", seconds["peer, generate"])]
    if config.device.startswith("cuda"):
        for row, arm in zip(rows, ("one row", "block", "round")):  # the last row is no forward
            decoder = ours[arm].args[0]
            row |= kernel_figures(decoder)
    return rows


def kernel_figures(decoder):
    """{"kernel_seconds", "kernels"} of a round of a Decoder, which replays its graph. Empty if the
    profiler sees no kernel."""
    decoder.state.position.fill_(CONTEXT)
    measured = kernel_time(decoder.run_round, 16)
    if measured is None:
        return {}
    seconds, kernels = measured
    return {"kernel_seconds": seconds, "kernels": kernels}


def our_arms(target, drafter, tokens, count, slots=1):
    """Functions that time `count` forwards of ours, each of so many sequences."""
    block_size = drafter.block_size
    decoders = {
        "one row": Decoder(target, None, 1024, 1, Sampling(), slots),
        "block": Decoder(target, None, 1024, block_size, Sampling(), slots),
        "round": Decoder(target, drafter, 1024, block_size, Sampling(), slots)}

    def decode(decoder):
        decoder.state.position.fill_(CONTEXT)  # each repeat begins where the prompt ended
        return seconds_of(decoder.run_round, count)

    arms = {}
    for name, decoder in decoders.items():
        for slot in range(slots):
            decoder.start_sequence(slot, tokens[0, :CONTEXT].tolist())
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
def prefill_rows(config, workload, peer, rate):
    """The time to the first token: reading a prompt and choosing the token after it, by the target
    alone, and with the context that a drafter needs besides. The floor is the target's only."""
    target = workload.target
    drafter = workload.drafter
    block_size = drafter.block_size
    lengths = (512, 1024, 4096, 16384) if config.device.startswith("cuda") else (512, 1024)
    device = target.embed_tokens.weight.device
    values = torch.empty(0, target.config.linear_value_head_dim, device=device)
    chunk = chunk_length(values)
    name = transformers_name()
    rows = []
    for length in lengths:
        if length + 512 > target.config.max_position_embeddings:
            continue
        tokens = torch.arange(length, device=device)[None] % min(1000, target.config.vocab_size)
        prompt_ids = tokens[0].tolist()

        def first_token(decoder):
            return seconds_of(lambda: decoder.start_sequence(0, prompt_ids))

        def peer_first_token():
            return seconds_of(lambda: peer(tokens, logits_to_keep=1).logits.argmax().item())

        buffer_length = round_up_to_power_of_two(length + 512)  # as for an answer of 496 tokens
        alone = Decoder(target, None, buffer_length, block_size, Sampling())
        with_drafter = Decoder(target, drafter, buffer_length, block_size, Sampling())
        for decoder in (alone, with_drafter):
            decoder.start_sequence(0, prompt_ids)  # and once more as warm-up: the second one is recorded
        seconds = race({
            "target": functools.partial(first_token, alone),
            "with drafter": functools.partial(first_token, with_drafter),
            "peer": peer_first_token})
        work = Work(prefill_operations(target, length, chunk), "operations", rate)
        row_name = f"time to the first token, {length:,} tokens"
        rows.append(report_row(row_name, seconds["target"], work, name, seconds["peer"]))
        rows.append(report_row(f"{row_name}, with drafter", seconds["with drafter"], work, name,
                               seconds["peer"]))
    return rows


# ------------------------------------------------------------------------------------------------
# the delta rule

HEADS = 16   # of the 0.8B, for queries, keys and values
WIDTH = 128  # of a head


def forward(kernel, inputs):
    with torch.no_grad():
        kernel(*inputs)


def forward_and_backward(kernel, inputs):
    output = kernel(*inputs)[0]
    torch.autograd.grad(output.sum(), inputs)


def kernel_rows(config, rate):
    """The chunked delta rule alone: forward, and forward with backward; a row for each peer."""
    lengths = (512, 2048, 4096, 16384) if config.device.startswith("cuda") else (2048,)
    peers = delta_rule_peers(config.device)
    rows = []
    for length in lengths:
        inputs = delta_rule_inputs(length, config.device, config.dtype)
        chunk = chunk_length(inputs[2])
        operations = delta_rule_operations(length, HEADS, WIDTH, WIDTH, chunk)
        name = f"delta rule, {length:,} tokens"
        rows += mode_rows(f"{name}, forward", forward, inputs, peers,
                          Work(operations, "operations", rate))
        # the backward pass makes twice the operations of the forward
        rows += mode_rows(f"{name}, forward and backward", forward_and_backward, inputs, peers,
                          Work(3 * operations, "operations", rate))
    return rows


def mode_rows(name, mode, inputs, peers, work):
    """A row for each peer, of ours and all peers in turns. A peer that refuses has its reason in
    place of its time: fla's backward does so with some versions of Triton on Hopper GPUs."""
    def seconds_with(kernel):
        return seconds_of(lambda: mode(kernel, inputs))

    arms = {"ours": functools.partial(seconds_with, gated_delta_rule)}
    refusals = {}
    for peer_name, kernel in peers.items():
        try:
            mode(kernel, inputs)
        except Exception as error:  # whatever other people's kernels raise
            reason = textwrap.shorten(str(error) or type(error).__name__, 100, placeholder=" ...")
            refusals[peer_name] = f"{peer_name}, which refuses: {reason}"
        else:
            arms[peer_name] = functools.partial(seconds_with, kernel)
    seconds = race(arms)

    rows = []
    for peer_name in peers:
        label = refusals.get(peer_name, peer_name)
        rows.append(report_row(name, seconds["ours"], work, label, seconds.get(peer_name)))
    return rows


def delta_rule_inputs(length, device, dtype):
    """Random q, k, v, g, beta: unit queries and keys, g below 0, beta from 0 to 1. As in a model of
    that dtype, all have it but g, which is fp32."""
    generator = torch.Generator(device).manual_seed(0)
    vectors = []
    for _ in range(3):
        vectors.append(torch.randn(1, length, HEADS, WIDTH, device=device, generator=generator))
    q, k, v = vectors
    q = F.normalize(q, dim=-1)
    k = F.normalize(k, dim=-1)
    beta = torch.rand(1, length, HEADS, device=device, generator=generator)
    decay = torch.rand(1, length, HEADS, device=device, generator=generator)
    dtype = getattr(torch, dtype)
    inputs = [q.to(dtype), k.to(dtype), v.to(dtype), -decay, beta.to(dtype)]
    return [x.requires_grad_() for x in inputs]
