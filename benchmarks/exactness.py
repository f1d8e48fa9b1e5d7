"""
Whether output with a drafter equals three others, token by token:

    fixed shape    the target alone, its forwards of as many rows: it must, to the last bit
    one row        the target alone, one row a step: other shapes round differently
    transformers   its own greedy generate: so do other kernels

for good and bad drafters, several temperatures and several dtypes. Where two outputs part, the
margin between the scores of the two tokens is printed, and by it a verdict: rounding only turns
over what is close. docs/bugs.md has the margins of states that are wrong.

With --slots=B all decode B sequences at once, but for transformers.
"""
import math
from typing import NamedTuple

import torch

from benchmarks.common import load, portions, setup_of, slots_of, timed_generate_many
from benchmarks.drafters import Oracle, random_drafter
from benchmarks.journal import Journal
from benchmarks.peer import peer_answer, transformers_peer
from benchmarks.timing import progress
from draft_decode import first_difference, round_up_to_power_of_two
from sampling import Sampling, gumbel_noise, perturbed_scores
from decode_state import DecodeState, prefill


# The largest margin of a choice that rounding turned over, by dtype. By far most are smaller: 0.16
# in bfloat16 was the largest so far, and none at all in float32. Its margins shrink with the error
# of the dtype.
LARGEST_ROUNDING = {"float32": 0.01, "float16": 0.05, "bfloat16": 0.25}
EQUAL = "equal"
ROUNDING = "rounding"
WRONG = "wrong state"
UNKNOWN = "unknown"     # they differ, and there are no two tokens to compare


def run(config):
    report_rows = []
    detailed_rows = []
    journal = None
    slots = slots_of(config)
    for dtype in config.dtypes:
        workload = load(config, default_count=4, dtype=dtype)
        setup = setup_of(config, workload.prompts, workload.stops)
        setup |= {"dtype": config.dtypes, "temperature": config.temperatures,
                  "oracle": config.oracle}
        journal = journal or Journal(config, "exactness", setup)
        drafters = drafters_of(config, workload)
        peer = transformers_peer(workload.target) if 0 in config.temperatures else None
        for temperature in config.temperatures:
            sampling = Sampling(temperature, config.top_k, config.top_p, config.seed,
                                config.draft_temperature)
            comparison = Comparison(config, workload, drafters, peer, sampling)
            prompts_by_name = {}
            for number, prompt in enumerate(workload.prompts):
                prompts_by_name[f"{dtype} {temperature} {number}"] = prompt.ids

            def measure(names):
                return comparison.measure([prompts_by_name[name] for name in names])

            names = list(prompts_by_name)
            prompt_rows = []
            for numbers in progress(portions(len(names), slots)):
                portion = [names[number] for number in numbers]
                prompt_rows += journal.rows_of(portion, measure)
            for row, differences in summarize(prompt_rows):
                row |= {"temperature": temperature, "dtype": dtype}
                row["verdict"] = verdict(row["identical"] == 1, row["margin"], dtype)
                report_rows.append(row)
                detailed_rows.append(row | {"differences": differences})
    journal.close(detailed_rows)
    print_table(report_rows)
    return {"command": "exactness", "slots": slots, "rows": report_rows}, setup


def drafters_of(config, workload):
    """{name: drafter}: an untrained one, the trained one, if any, and two oracles: one that is
    right with the probability of the key `oracle`, and one that is always wrong."""
    trained = workload.drafter
    drafters = {}
    if config.drafter == "random":
        drafters["random"] = trained
    else:
        drafters["random"] = random_drafter(workload.target)
        drafters["trained"] = trained
    block_size = drafters["random"].block_size
    if trained.block_size != block_size:
        raise ValueError(f"{config.drafter} drafts blocks of {trained.block_size}; exactness "
                         f"compares drafters of {block_size}: give such a one, "
                         "or --drafter=random")
    portion_length = len(portions(len(workload.prompts), slots_of(config))[0])
    for name in ("oracle", "wrong"):
        drafters[name] = Oracle(workload.target, block_size=block_size, prompts=portion_length)
    return drafters


class Difference(NamedTuple):
    """Where the tokens of a drafter and of another mode part."""
    drafter: str
    against: str
    position: int | None   # None: they are equal
    margin: float | None   # between the scores of both tokens; None: there are no two to compare


class Comparison:
    """All drafters against all other modes, at one dtype and one temperature."""

    def __init__(self, config, workload, drafters, peer, sampling):
        self.config = config
        self.workload = workload
        self.drafters = drafters
        self.peer = peer
        self.sampling = sampling
        self.block_size = workload.drafter.block_size
        self.slots = slots_of(config)
        self.decoders = {}

    def decode(self, drafter, prompts, tokens_per_forward):
        """A Generation of each prompt."""
        return timed_generate_many(
            self.workload.target, drafter, prompts, self.config.max_new_tokens, self.slots,
            self.workload.stops, tokens_per_forward, self.sampling, self.decoders)

    def measure(self, prompts):
        """The journal's rows of some prompts, lists of token ids: for each the Differences, and
        [tokens, rounds] by drafter."""
        others = {
            "fixed shape": self.decode(None, prompts, self.block_size),
            "one row": self.decode(None, prompts, 1)}
        for number, prompt_ids in enumerate(prompts):
            answer = others["fixed shape"][number].tokens
            for name, p in (("oracle", self.config.oracle), ("wrong", 0.0)):
                self.drafters[name].learn(prompt_ids, answer, p, number)
        ours = {}
        for name, drafter in self.drafters.items():
            ours[name] = self.decode(drafter, prompts, self.block_size)

        rows = []
        for number, prompt_ids in enumerate(prompts):
            answers = {against: other[number].tokens for against, other in others.items()}
            if self.peer is not None and self.sampling.temperature == 0:
                answers["transformers"] = peer_answer(
                    self.peer, prompt_ids, self.config.max_new_tokens, self.workload.stops,
                    self.block_size)
            differences = []
            counts = {}
            for name in self.drafters:
                tokens, rounds, _ = ours[name][number]
                counts[name] = [sum(len(result.tokens) for result in rounds), len(rounds)]
                for against, other in answers.items():
                    position = first_difference(tokens, other)
                    margin = self.margin(prompt_ids, tokens, other, position)
                    differences.append(Difference(name, against, position, margin))
            rows.append({"differences": differences, "rounds": counts})
        return rows

    @torch.inference_mode()
    def margin(self, prompt_ids, tokens, other, position):
        """How far apart the scores of the first two tokens that differ are. What rounding turned
        over is close; what a wrong state did need not be. None where an output ended, or where
        top_k or top_p leave only one of the tokens."""
        if position is None or position >= min(len(tokens), len(other)):
            return None
        target = self.workload.target
        ids = torch.tensor([prompt_ids + tokens[:position]], device=self.config.device)
        count = ids.shape[1]
        # lengths of a buffer are few, as compiled layers are compiled for each
        length = round_up_to_power_of_two(count + self.block_size)
        length = min(length, target.config.max_position_embeddings)
        state = DecodeState(target, 1, length, self.block_size)
        _, logits = prefill(target, ids, state)
        noise = None
        if self.sampling.temperature:
            positions = torch.tensor([count], device=self.config.device)
            noise = gumbel_noise(self.sampling.seed, positions, logits.shape[-1])
        scores = perturbed_scores(logits.float(), self.sampling, self.sampling.temperature, noise)
        gap = (scores[0, tokens[position]] - scores[0, other[position]]).abs().item()
        if math.isfinite(gap):
            return gap


# ------------------------------------------------------------------------------------------------
# the report


def summarize(prompt_rows):
    """[(a row of the report, its [position, margin] prompt by prompt)], one for each drafter and
    each mode that it was compared with."""
    groups = {}
    for prompt_row in prompt_rows:
        for difference in prompt_row["differences"]:
            difference = Difference(*difference)  # a list, if the journal was read from its file
            groups.setdefault((difference.drafter, difference.against), []).append(difference)
    summaries = []
    for (drafter, against), differences in groups.items():
        different = [d for d in differences if d.position is not None]
        worst = max(different, key=lambda d: d.margin or 0.0, default=None)
        tokens = sum(row["rounds"][drafter][0] for row in prompt_rows)
        rounds = sum(row["rounds"][drafter][1] for row in prompt_rows)
        row = {"drafter": drafter, "against": against, "prompts": len(differences),
               "identical": 1 - len(different) / len(differences),
               "margin": worst and worst.margin, "position": worst and worst.position,
               "tau": tokens / max(1, rounds)}
        summaries.append((row, [(d.position, d.margin) for d in differences]))
    return summaries


def verdict(is_identical, margin, dtype):
    """What outputs are to others: EQUAL, or different by ROUNDING or by more, or UNKNOWN.

    margin: the largest of those where two outputs first differ. One prompt's may be small by
    chance, also where a state is wrong, so ROUNDING takes a few prompts to be believed.
    """
    if is_identical:
        return EQUAL
    if margin is None:
        return UNKNOWN
    if margin <= LARGEST_ROUNDING[dtype]:
        return ROUNDING
    return WRONG


def print_table(rows):
    print(f"{rows[0]['prompts']} prompts; margin: between the scores of the two tokens that first "
          "differ, the largest\n")
    print(f"{'dtype':9} {'T':>4} {'drafter':8} {'tau':>6}  {'against':13} {'identical':>9} "
          f"{'margin':>8} {'token':>6}  verdict")
    for row in rows:
        position = "-" if row["position"] is None else row["position"]
        margin = "-" if row["margin"] is None else f"{row['margin']:.4f}"
        print(f"{row['dtype']:9} {row['temperature']:4} {row['drafter']:8} {row['tau']:6.2f}  "
              f"{row['against']:13} {row['identical']:9.1%} {margin:>8} {position:>6}  "
              f"{row['verdict']}")
