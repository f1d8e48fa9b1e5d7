"""
The time of a 1-token forward, a 16-token forward, a round, and the first token of a prompt (TTFT),
next to transformers with the same weights. (For training steps see scaling.)

Times are medians of repeats in alternating order. `rate` is the rate that a row reached: bytes of
weights per second, or operations. `times_roofline` is the time divided by the time at the best rate
of this machine, which is its copy bandwidth, or the rate of a large product. Both are measured in
the same run.
"""
import copy

import torch

from benchmarks.common import check_finite, load, print_table, text_of
from benchmarks.reference import transformers_name, transformers_reference
from benchmarks.timing import best_rates, device_name, median_seconds, seconds_of
from delta_rule import chunk_length
from draft_decode import Decoder, round_up_to_power_of_two
from sampling import Sampling
from training.flops import prefill_operations

CONTEXT = 256  # tokens before each decoded one
CALLS = 16     # rounds or forwards in a row that are timed together
COLUMNS = ("name", "seconds", "times_roofline", "rate", "unit", "reference_seconds", "ratio")


@torch.inference_mode()
def run(config):
    target, drafter, *_ = load(config, default_count=1)
    rates = best_rates(config.device, config.dtype)
    peer = transformers_name()
    print(f"{config.dtype} on {device_name(config.device)}, at most {text_of(rates)}, next to "
          f"{peer}\n")
    rows = []
    for name, work, unit, functions in cases(config, target, drafter):
        seconds = median_seconds(functions)
        row = {"name": name, "seconds": seconds["ours"], "unit": unit,
               "rate": work / seconds["ours"] / 1e9}
        row["times_roofline"] = rates[unit] / row["rate"]
        if "reference" in functions:
            row["reference_seconds"] = seconds["reference"]
            row["ratio"] = seconds["reference"] / seconds["ours"]
        rows.append(row)
        print_table([row], COLUMNS, header=len(rows) == 1)
    return {"best_rates": rates, "reference": peer, "rows": rows}


def cases(config, target, drafter):
    """Yields (name, work, its unit, functions for median_seconds()) of each row. The work is bytes
    of weights to read, or operations."""
    reference = transformers_reference(target)
    K = drafter.block_size
    target_bytes = weight_bytes(target)
    for length in (1, K):
        yield f"{length}-token forward", target_bytes, "GB/s", {
            "ours": timed_rounds(target, None, length),
            "reference": timed_reference(reference, length)}
    # a round reads the head twice: for the guesses and for their verification
    round_bytes = target_bytes + weight_bytes(drafter) + target.head_weight.nbytes
    yield "round of draft and verify", round_bytes, "GB/s", {
        "ours": timed_rounds(target, drafter, K)}

    values = torch.empty(
        0, target.config.linear_value_head_dim, device=target.embed_tokens.weight.device)
    lengths = (512, 4096, 16384) if config.device.startswith("cuda") else (512, 1024)
    for length in lengths:
        if length + 512 <= target.config.max_position_embeddings:
            operations = prefill_operations(target, length, chunk_length(values))
            yield f"TTFT, {length:,} tokens", operations, "GFLOP/s", {
                "ours": timed_ttft(target, length),
                "reference": timed_reference_ttft(reference, length)}


def weight_bytes(model):
    """Bytes of the weights that a forward reads. It reads only a few rows of an embedding, unless
    the embedding is also the head."""
    weights = dict(model.named_parameters())
    if not model.config.tie_word_embeddings:
        weights.pop("embed_tokens.weight", None)
    return sum(weight.nbytes for weight in weights.values())


def example_ids(length):
    """Token ids that every vocabulary has."""
    return [i % 100 for i in range(length)]


def timed_rounds(target, drafter, tokens_per_forward, slots=1):
    """A function that times rounds of a Decoder. All slots hold a sequence of CONTEXT tokens."""
    decoder = Decoder(
        target, drafter, length=1024, tokens_per_forward=tokens_per_forward, sampling=Sampling(),
        batch=slots)
    prompts = {slot: example_ids(CONTEXT) for slot in range(slots)}
    decoder.start_sequences(prompts, dict.fromkeys(prompts, 0))

    def seconds_per_round():
        decoder.state.position.fill_(CONTEXT)  # every repeat begins at the end of the prompt
        seconds = seconds_of(decoder.run_round, CALLS)
        check_finite(all(decoder.is_finite), "--target")
        return seconds

    return seconds_per_round


def timed_reference(reference, length):
    """A function that times transformers' forwards, with a fresh cache in every repeat."""
    ids = torch.tensor([example_ids(CONTEXT + length)], device=reference.device)
    prompt_cache = reference(ids[:, :CONTEXT], use_cache=True).past_key_values

    def seconds_per_forward():
        cache = copy.deepcopy(prompt_cache)
        return seconds_of(lambda: reference(ids[:, CONTEXT:], past_key_values=cache), CALLS)

    return seconds_per_forward


def timed_ttft(target, length):
    """A function that times the target alone: prefill a prompt and choose the next token."""
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
