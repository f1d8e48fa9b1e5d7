"""
Writes docs/round.html, a page that steps through the rounds of one answer: a recorded run of the
shipped pair, and runs of the same prompt with bugs. The page is benchmarks/page.html, filled with
two JSON objects. On one machine only the times differ between two runs of this command.
"""
import json

import torch

import fast
from benchmarks.bugs import right_at_shift
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.common import Workload
from benchmarks.inject_bug import Bug
from checkpoint import load_drafter, load_target
from decode_state import DecodeState
from draft_decode import Decoder, Request, collect, decode_in_slots, generate
from formats.files import printable, write_whole
from sampling import Sampling
from tokenizer import chat_prompt, load_tokenizer, stop_ids

TEMPLATE = "benchmarks/page.html"
PAGE = "docs/round.html"
QUESTION = "What is the average of the numbers 5, 4, 7 and 16 that Cara writes?"
NAMES = ("rejected_state_kept", "features_one_late", "causal_block", "rope_theta_of_another")
BUGS = [Bug("clean", None), *[bug for bug in DECODING if bug.name in NAMES]]
MAX_NEW_TOKENS = 73     # the length of the right answer, because a wrong one may never end
REPEATS = 8             # of each time


def run(config):
    workload = shipped_pair()
    write_whole(PAGE, fill_template(record(workload), measure(workload)))
    print(f"wrote {PAGE}")
    return {"wrote": PAGE}


def shipped_pair():
    """The Workload of the page: the nano pair on a CPU, and the token ids of one prompt."""
    target = load_target("data/nano/target")
    drafter = load_drafter("data/nano/drafter-dflash", target.config)
    fast.prepare_for_decoding(target, drafter)
    tokenizer = load_tokenizer("data/nano/target")
    prompt = chat_prompt(tokenizer, QUESTION)
    return Workload(target, drafter, tokenizer, [prompt], stop_ids(tokenizer), {})


def fill_template(recording, times):
    """The page as text. In its scripts, the text of a token must not look like a tag."""
    with open(TEMPLATE, encoding="utf-8") as f:
        page = f.read()
    for name, value in (("TIMES", times), ("RECORDING", recording)):
        page = page.replace(name, json.dumps(value).replace("<", "\\u003c"))
    return page


@torch.inference_mode()
def record(workload):
    """The prompt, the text of each token id, the target's visibility, and {name of a bug: run}."""
    target, drafter, tokenizer, (prompt,), *_ = workload
    state = DecodeState(target, batch=1, length=drafter.block_size)

    def target_forward(tokens):
        return target(tokens, state)[1]

    runs = {}
    for bug in BUGS:
        with bug.injected():
            runs[bug.name] = record_run(workload)
    texts = [printable(tokenizer.decode([i])) for i in range(target.config.vocab_size)]
    block = torch.zeros(1, drafter.block_size, dtype=torch.long)
    return {"prompt": prompt, "texts": texts, "runs": runs,
            "target_sees": visibility(target_forward, block)}


def record_run(workload):
    """An answer's tokens, its rounds, the percentage of guesses that are right one place early, in
    place, and one late (right_at_shift of benchmarks/bugs.py), and the drafter's visibility."""
    target, drafter, _, (prompt,), stops, _ = workload
    request = Request(
        0, prompt, sequence_id=0, stops=stops, max_new_tokens=MAX_NEW_TOKENS,
        config=target.config, tokens_per_forward=drafter.block_size)
    recorder = Recorder(
        target, drafter, length=request.buffer_length, tokens_per_forward=drafter.block_size,
        sampling=Sampling())
    recorder.rounds = []
    answer = collect(output for _, output in decode_in_slots(recorder, [request], 1))
    for one_round, output in zip(recorder.rounds, answer.rounds):
        one_round["returned"] = len(output.tokens)  # those after the end are dropped

    def drafter_forward(embedded):
        return drafter.decode_block(embedded, recorder.cache, recorder.state.position)

    embedded = drafter.embed_block(recorder.anchor, target.embed_tokens.weight)
    shares = right_at_shift([answer], [answer])
    return {"tokens": answer.tokens, "rounds": recorder.rounds,
            "right_at_shift": [round(100 * share) for share in shares],
            "drafter_sees": visibility(drafter_forward, embedded)}


class Recorder(Decoder):
    """A Decoder of one sequence that adds what a round did to its list `rounds`."""

    def round_kernels(self):
        position = self.state.position.item()
        # a draft changes nothing, so it can run once more for its probabilities
        logits = self.drafter.draft_logits(
            self.anchor, self.target, self.cache, self.state.position)
        percent = 100 * logits.softmax(-1).amax(-1)[0]                       # (K-1,)
        result = super().round_kernels()
        anchor, *guesses = self.block[0].tolist()
        accepted, *choices = result[0, :2 + len(guesses)].tolist()
        self.rounds.append({
            "position": position, "anchor": anchor, "guesses": guesses, "choices": choices,
            "accepted": accepted, "percent": percent.round().int().tolist()})
        return result


def visibility(forward, block):
    """A matrix: row i has a 1 at j if position i of a block sees j. That is, a different input at
    j changes the output at i."""
    outputs = forward(block)                                                 # (1, K, width)
    columns = []
    for j in range(block.shape[1]):
        changed = block.clone()
        changed[:, j] += 1
        differs = (forward(changed) != outputs).any(-1)[0]                   # (K,)
        columns.append(differs.int())
    return torch.stack(columns, 1).tolist()


def measure(workload):
    """The milliseconds of each round of {name of a bug: run}, and of each token of the target
    alone. They are the least of REPEATS runs, because other programs can only slow a round down."""
    modes = [(bug, workload.drafter, None) for bug in BUGS]
    modes.append((Bug("target alone", None), None, 1))
    runs = {bug.name: [] for bug, _, _ in modes}
    for _ in range(REPEATS):
        for bug, drafter, tokens_per_forward in modes:
            with bug.injected():
                outputs = list(generate(
                    workload.target, drafter, workload.prompts[0], max_new_tokens=MAX_NEW_TOKENS,
                    stop_token_ids=workload.stops, tokens_per_forward=tokens_per_forward))
            runs[bug.name].append([1000 * output.seconds for output in outputs[1:]])

    times = {}
    for name, repeats in runs.items():
        times[name] = [round(min(of_round), 2) for of_round in zip(*repeats)]
    return times
