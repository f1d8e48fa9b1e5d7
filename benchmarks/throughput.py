"""
Many sequences at once: tokens a second of all of them and of each, with and without the drafter, at
several numbers of slots. It answers at which load speculation stops paying.

A round of B sequences reads the weights once, for all of them, but computes B times as much. One
sequence waits for the weights mostly, so rows cost little, and a round of 16 rows is not much
slower than a forward of one. The more sequences there are, the more their rows cost. So the tau
from which a round pays, which is its time over that of a forward of one row each, rises with B.

Rounds are timed with all slots busy, at a context of 256 tokens in a buffer of 1,024. tau is that
of the prompts, decoded in as many slots. A target with random weights has no drafter that guesses
right, so an oracle stands in, which is right as often as --assumed_tau asks and costs what the
drafter costs. It knows one answer, so all slots decode the same prompt then.
"""
import itertools
import os
from statistics import median

import torch

from benchmarks import pictures
from benchmarks.common import load, mean_round_length, sampling_of, setup_of, timed_generate_many
from benchmarks.drafters import Oracle, probability_for
from benchmarks.machine import bytes_read, copy_bandwidth, device_name
from benchmarks.speed import CONTEXT, our_arms
from benchmarks.timing import clock, race
from draft_decode import generate_many

SLOTS = (1, 2, 4, 8, 16, 32)
MODES = {  # the timed arm behind each mode
    "speculative": "round",
    "target_same_shape": "block",
    "target": "one row",
}


def run(config):
    all_slots = config.slots or SLOTS
    if min(all_slots) < 1:
        raise ValueError(f"slots = {config.slots}: decode at least one sequence at a time")
    workload = load(config, default_count=64)
    bandwidth = copy_bandwidth(config.device)
    size = bytes_read(workload.target, workload.drafter)
    floor = {"target": size["step"] / bandwidth, "target_same_shape": size["step"] / bandwidth,
             "speculative": size["round"] / bandwidth}
    print(f"{config.dtype} on {device_name(config.device)}, torch {torch.__version__}: copies "
          f"{bandwidth / 1e9:,.0f} GB/s; a round reads {size['round'] / 1e6:,.1f} MB of weights in "
          f"{1e3 * floor['speculative']:.3f} ms at least, a forward of the target "
          f"{size['step'] / 1e6:,.1f} MB in {1e3 * floor['target']:.3f} ms\n")
    rows = []
    for slots in all_slots:
        row = round_seconds(config, workload, slots)
        row |= decoded(config, workload, slots)
        add_speeds(row, floor)
        rows.append(row)
        print_rows(rows[-1:], with_head=len(rows) == 1)
    print(f"\n{verdict(rows)}")
    pictures.throughput(os.path.join(config.out_dir, "throughput.png"), {config.target: rows})
    print(f"wrote {config.out_dir}/throughput.png")
    report = {
        "command": "throughput", "target": config.target, "compile": config.compile,
        "device": device_name(config.device), "dtype": config.dtype, "torch": torch.__version__,
        "copy_bytes_per_s": bandwidth, "bytes": size, "floor_seconds": floor, "rows": rows}
    return report, setup_of(config, workload.prompts, workload.stops)


# ------------------------------------------------------------------------------------------------
# what is measured


@torch.inference_mode()
def round_seconds(config, workload, slots):
    """{"slots", "seconds": {mode: of a round}, "memory_bytes": that a sequence takes}. All slots
    are busy, and the modes take turns."""
    block_size = workload.drafter.block_size
    count = 32 if config.device.startswith("cuda") else 8  # rounds in a repeat
    tokens = torch.arange(CONTEXT + block_size)[None] % 100
    arms = our_arms(workload.target, workload.drafter, tokens, count, slots)
    memory = memory_bytes(arms["round"].args[0])
    seconds = race(arms)
    return {
        "slots": slots, "memory_bytes": memory // slots,
        "seconds": {mode: median(seconds[arm]) for mode, arm in MODES.items()}}


def memory_bytes(decoder):
    """Bytes that a Decoder keeps of its sequences, the target's and the drafter's."""
    state = decoder.state
    kept = [state.keys, state.values, state.S, state.S_chunk_end, state.window, state.conv]
    for keys_and_values in decoder.cache:
        kept += keys_and_values
    return sum(tensor.nbytes for tensor in kept)


def decoded(config, workload, slots):
    """{"tau", "decoded_tokens_per_s"} of the prompts decoded in slots. These tokens/s are of the
    whole time: prompts are read in it, and slots are idle when no prompt waits any more."""
    drafter = workload.drafter
    prompts = [prompt.ids for prompt in workload.prompts]
    sampling = sampling_of(config)
    decoders = {}

    def request(drafter, prompts):
        return (workload.target, drafter, prompts, config.max_new_tokens, slots, workload.stops,
                drafter and drafter.block_size, sampling, decoders)

    if config.drafter == "random":
        prompts = prompts[:1] * slots
        answer = timed_generate_many(*request(None, prompts))[0].tokens
        oracle = Oracle(workload.target, drafter, drafter.block_size)
        p = probability_for(config.assumed_tau, drafter.block_size)
        oracle.learn(prompts[0], answer, p)
        drafter = oracle
    # some rounds first, so that nobody pays for the first use of a kernel or a graph
    list(itertools.islice(generate_many(*request(drafter, prompts)), 4 * slots))

    began = clock()
    generations = timed_generate_many(*request(drafter, prompts))
    elapsed = clock() - began
    rounds = []
    token_count = 0
    for generation in generations:
        token_count += len(generation.tokens)
        for piece in generation.rounds:
            rounds.append([piece.accepted, piece.tokens])
    return {"tau": mean_round_length(rounds), "decoded_tokens_per_s": token_count / elapsed}


def add_speeds(row, floor):
    """Adds to a row what follows from its seconds and its tau."""
    row["tokens_per_s"] = {}
    row["times_floor"] = {}
    for mode, seconds in row["seconds"].items():
        tokens = row["tau"] if mode == "speculative" else 1
        row["tokens_per_s"][mode] = row["slots"] * tokens / seconds
        row["times_floor"][mode] = seconds / floor[mode]
    row["speedup"] = row["tokens_per_s"]["speculative"] / row["tokens_per_s"]["target"]
    row["break_even_tau"] = row["seconds"]["speculative"] / row["seconds"]["target"]


# ------------------------------------------------------------------------------------------------
# the report


def print_rows(rows, with_head):
    if with_head:
        print(f"{'':5} | {'drafter and target':^42} | {'target, 16 rows':^25} | "
              f"{'target, one row':^25} |")
        print(f"{'slots':>5} | {'tau':>5} {'tokens/s':>9} {'a sequence':>10} {'ms':>8} "
              f"{'floor':>6} | {'tokens/s':>9} {'ms':>8} {'floor':>6} | {'tokens/s':>9} {'ms':>8} "
              f"{'floor':>6} | {'speedup':>7} {'pays from tau':>13} {'MB a sequence':>13}")
    for row in rows:
        cells = {mode: f"{row['tokens_per_s'][mode]:9,.0f}" for mode in MODES}
        times = {mode: f"{1e3 * row['seconds'][mode]:8.2f} {row['times_floor'][mode]:5.1f}x"
                 for mode in MODES}
        of_one = row["tokens_per_s"]["speculative"] / row["slots"]
        print(f"{row['slots']:5} | {row['tau']:5.2f} {cells['speculative']} {of_one:10,.0f} "
              f"{times['speculative']} | {cells['target_same_shape']} "
              f"{times['target_same_shape']} | {cells['target']} {times['target']} | "
              f"{row['speedup']:6.2f}x {row['break_even_tau']:13.2f} "
              f"{row['memory_bytes'] / 1e6:13.1f}", flush=True)


def verdict(rows):
    """The answer in words: at which load speculation stops paying."""
    first = rows[0]
    last = rows[-1]
    for row in rows:
        if row["speedup"] <= 1:
            return (f"Speculation does not pay at {row['slots']} slots: {row['speedup']:.2f}x, its "
                    f"tau of {row['tau']:.2f} is not above {row['break_even_tau']:.2f}.")
    return (f"Speculation pays at all these loads: {first['speedup']:.2f}x at {first['slots']} "
            f"slots, {last['speedup']:.2f}x at {last['slots']}.")
