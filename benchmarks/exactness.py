"""
Compares the output with a drafter, token by token, with three others:

    same shape     the target alone, also with K-token forwards: must be bitwise identical
    1-token        the target alone, with 1-token forwards: equal up to rounding
    transformers   its own greedy generate: equal up to rounding

for good and bad drafters at several temperatures, in the dtype of the key `dtype`. If two outputs
differ, the verdict follows from the margin between the target's scores of the first two tokens that
differ. Rounding only flips near-ties. docs/bugs.md has the margins of states that are wrong.
"""
import itertools
import math
from types import SimpleNamespace

import torch

from benchmarks.common import (groups_of, load, mean_round_length, mode_of, pairs_of, print_table,
                               sampling_of, slots_of, write_rows)
from benchmarks.drafters import Oracle, random_drafter
from benchmarks.reference import transformers_reference
from benchmarks.timing import progress
from draft_decode import Generation, first_difference
from sampling import gumbel_noise, perturbed_scores

# The largest margin that we call rounding, by dtype. Almost all margins are smaller. The largest
# that rounding has flipped so far is 0.16 in bfloat16, and it has flipped none in float32.
LARGEST_ROUNDING = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
EQUAL = "equal"
ROUNDING = "rounding"
WRONG = "wrong state"
UNKNOWN = "unknown"     # the outputs differ, and there are no two tokens to compare

DRAFTERS = ("random", "trained", "oracle", "wrong")
REFERENCES = ("same shape", "1-token", "transformers")
COLUMNS = ("temperature", "drafter", "tau", "against", "prompts", "identical", "margin", "verdict")
ORACLES = {"oracle": 0.8, "wrong": 0.0}  # the probability that a guess of each one is right


def run(config):
    workload = load(config, default_count=4)
    rows = []
    details = []
    for temperature in config.temperatures:
        here = SimpleNamespace(**vars(config) | {"temperature": temperature})
        outputs = outputs_of(here, workload._replace(decoders={}))
        for drafter, against in itertools.product(DRAFTERS, REFERENCES):
            if drafter in outputs and against in outputs:
                names = {"temperature": temperature, "drafter": drafter, "against": against}
                differences = []
                for number, pair in enumerate(zip(outputs[drafter], outputs[against])):
                    differences.append(compare(here, workload, number, *pair))
                rows.append(names | summarize(differences, config.dtype))
                details += [names | difference for difference in differences]
    write_rows(config, "exactness", details)
    print_table(rows, COLUMNS)
    identical = min(row["identical"] for row in rows if row["against"] == "same shape")
    return {"slots": slots_of(config), "identical": identical, "rows": rows}


def outputs_of(config, workload):
    """{mode: the Generation of each prompt}: the target alone in two shapes; at temperature 0
    transformers; and four drafters. These are an untrained one, the trained one if there is one,
    and the ORACLES, which know the target's answer."""
    target = workload.target
    block_size = workload.drafter.block_size
    modes = {"same shape": mode_of(config, workload, None, block_size),
             "1-token": mode_of(config, workload, None, 1)}
    if config.temperature == 0:
        modes["transformers"] = transformers_mode(config, workload)
    modes["random"] = mode_of(config, workload, random_drafter(target, block_size), block_size)
    if config.drafter != "random":
        modes["trained"] = mode_of(config, workload, workload.drafter, block_size)
    oracles = {}
    for name in ORACLES:
        oracles[name] = Oracle(target, block_size=block_size, prompts=len(workload.prompts))
        modes[name] = mode_of(config, workload, oracles[name], block_size)

    outputs = {name: [] for name in modes}
    for group in progress(groups_of(workload.prompts, slots_of(config))):
        prompts = [prompt.ids for prompt in group]
        answers = modes["same shape"](prompts)
        outputs["same shape"] += answers
        for name, oracle in oracles.items():
            for place, answer in enumerate(answers):
                oracle.learn(prompts[place], answer.tokens, ORACLES[name], place)
        for name, decode in modes.items():
            if name != "same shape":
                outputs[name] += decode(prompts)
    return outputs


def transformers_mode(config, workload):
    """transformers' greedy generate, one prompt at a time. Its answers end like our own: at a stop,
    at the limit, or when the target's context has no room for another block."""
    reference = transformers_reference(workload.target)
    room = reference.config.max_position_embeddings - workload.drafter.block_size

    @torch.inference_mode()
    def decode(prompts):
        generations = []
        for prompt_ids in prompts:
            prompt = torch.tensor([prompt_ids], device=reference.device)
            output = reference.generate(
                prompt, attention_mask=torch.ones_like(prompt), do_sample=False, pad_token_id=0,
                max_new_tokens=min(config.max_new_tokens, room - len(prompt_ids)),
                eos_token_id=sorted(workload.stops) or None)
            tokens = output[0, len(prompt_ids):].tolist()
            generations.append(Generation(tokens, [], 0.0))
        return generations
    return decode


def compare(config, workload, number, ours, other):
    """How our output for a prompt differs from another mode's, both Generations. position: of the
    first token that differs; None: the outputs are equal."""
    prompt_ids = workload.prompts[number].ids
    margin = margin_of(
        workload.target, sampling_of(config), prompt_ids, ours.tokens, other.tokens)
    return {"prompt": number, "position": first_difference(ours.tokens, other.tokens),
            "margin": margin, "rounds": pairs_of(ours.rounds)}


@torch.inference_mode()
def margin_of(target, sampling, prompt_ids, tokens, other):
    """The margin between the target's scores of the first two tokens that differ. Rounding flips
    small margins only, while a wrong state flips any. None if the outputs are equal, if one of them
    ends there, or if top_k or top_p exclude one of the two tokens."""
    position = first_difference(tokens, other)
    if position is None or position >= min(len(tokens), len(other)):
        return None
    device = target.embed_tokens.weight.device
    ids = torch.tensor([prompt_ids + tokens[:position]], device=device)
    _, hidden = target(ids)
    logits = target.logits(hidden[:, -1:])[:, 0]
    noise = None
    if sampling.temperature:
        positions = torch.tensor([ids.shape[1]], device=device)
        sequence_ids = torch.zeros_like(positions)  # generate() decodes sequence 0
        noise = gumbel_noise(sampling.seed, sequence_ids, positions, logits.shape[-1])
    scores = perturbed_scores(logits.float(), sampling, sampling.temperature, noise)
    margin = (scores[0, tokens[position]] - scores[0, other[position]]).abs().item()
    if math.isfinite(margin):
        return margin
    return None


def summarize(differences, dtype):
    """The figures of a row of the report, from the differences of all prompts."""
    identical = sum(difference["position"] is None for difference in differences)
    margins = [difference["margin"] for difference in differences]
    margin = max((m for m in margins if m is not None), default=None)
    rounds = sum([difference["rounds"] for difference in differences], [])
    return {"prompts": len(differences), "identical": identical / len(differences),
            "margin": margin, "tau": mean_round_length(rounds), "dtype": dtype,
            "verdict": verdict(identical == len(differences), margin, dtype)}


def verdict(is_identical, margin, dtype):
    """What explains the outputs of a group of prompts: EQUAL, ROUNDING, WRONG, or UNKNOWN.

    margin: the largest of the group. A wrong state can also flip a near-tie first, so believe
    ROUNDING only over several prompts.
    """
    if is_identical:
        return EQUAL
    if margin is None:
        return UNKNOWN
    if margin <= LARGEST_ROUNDING[dtype]:
        return ROUNDING
    return WRONG
