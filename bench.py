"""
Measures a drafter. Each command prints a table and, as its last line, JSON; figures and raw rounds go to out_dir.

    python bench.py acceptance                                   # the shipped nano pair on its held-out prompts
    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py acceptance --prompts=FILE.jsonl              # lines with "question" and, if known, "answer"
    python bench.py speedup                                      # prompt by prompt against the target alone
    python bench.py speedup --prompts=math500 --limit=64 --max_new_tokens=2048 --target=DIR --drafter=DIR --hf
    python bench.py exactness                                    # is the output the target's own, to the bit
    python bench.py exactness --target=random:0.8b:4 --drafter=random --prompts=random:64:256
    python bench.py curve                                        # speedup against tau, from drafters right by chance
    python bench.py coupling                                     # sampling: which guesses agree with the target most
    python bench.py serve --base_url=http://localhost:30000/v1 --baseline_url=http://localhost:30001/v1 --concurrency=8
    python bench.py report A/speedup.json B/speedup.json         # runs side by side; each left its JSON in its out_dir
    python bench.py figures                                      # the README's pictures, from the reports in logs/
    python bench.py speed --target=random:0.8b --drafter=random --prompts=random:64:256   # against transformers
    python bench.py speed --parts=training                       # a training step against its arithmetic; ten minutes

tau, the acceptance length, is the number of tokens returned in a round, the target's own included. micro: all tokens
over all rounds. macro: the mean over prompts of each prompt's mean. Tokens past the end of an answer do not count, and
neither does the prompt's own first token, which no round made. The baseline is our fastest target-only mode, one row a
step; both arms run prompt by prompt in one process, in alternating order. Every round of both is timed, the drafter's
first guess too; the prefill, which they share, is not.
"""
import hashlib
import itertools
import json
import math
import os
import random
import sys
import time
from dataclasses import dataclass
from statistics import median

import torch
from tqdm import tqdm

import plots
from configurator import configure
from data.math500.prepare import SUFFIX
from data.nano.problems import boxed, problems
from data.rows import read_source
from draft_decode import Sampling, choose, first_difference, gumbel, run, score
from model import DFlashDraftModel, drafter_config, load_drafter, pack_linears
from target import DecodeState, chat_prompt, load_target, load_tokenizer, stop_ids

target = "data/nano/target"             # folder of the target, or random:0.8b and the like
drafter = "data/nano/drafter-dflash"    # folder of the drafter, or random: untrained, of the target's own widths
prompts = "nano"                        # nano, math500, gsm8k, humaneval; math500:FILE: a copy; JSON lines; random:A:B
limit = 0                               # prompts at most; 0: as many as the command takes about two minutes for
max_new_tokens = 512                    # of an answer
thinking = False                        # let a target that can think do so
temperature = 0.0                       # of the target's choice; 0 is greedy (exactness has temperatures)
top_k = 0                               # choose among so many likeliest tokens; 0: all
top_p = 1.0                             # choose among the likeliest tokens that hold this share; 1: all
seed = 0                                # of the noise
draft_temperature = 0.0                 # above 0: guesses share the target's noise, at this temperature
temperatures: tuple[float] = (0.0, 0.7, 1.0)                # of exactness and coupling
dtypes: tuple[str] = ("float32", "bfloat16")                # of exactness
oracle = 0.8                            # probability that a guess of exactness' oracle is right
repeats = 3                             # of each prompt in speedup, whose median counts
hf = False                              # speedup also times transformers' own generate
base_url = ""                           # of serve: the server with a drafter, its address up to /v1
baseline_url = ""                       # of serve: the server without one
served_model = ""                       # of serve: the target's name there; empty: the first that each lists
concurrency = 1                         # of serve: requests at a time
timeout = 600.0                         # of serve: seconds until a request counts as failed
out_dir = "out/bench"                   # figures and raw results
resume = False                          # go on from what an interrupted command left in out_dir
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
parts: tuple[str] = ("decoding", "prefill", "kernel")       # of speed; also memory, training
compile = False                         # compile the target's layers: a minute or two once, then faster decoding

# ----------------------------------------------------------------------------------------------------------------------
# prompts and answers


@dataclass
class Prompt:
    """Token ids to continue, and the known answer, if any."""
    ids: list
    answer: str | None


# name: (hub id, its configuration, question of a row, answer of a row)
PUBLIC = {
    "math500": ("HuggingFaceH4/MATH-500", None, lambda row: row["problem"] + SUFFIX, lambda row: row["answer"]),
    "gsm8k": ("openai/gsm8k", "main", lambda row: row["question"] + SUFFIX,
              lambda row: row["answer"].split("####")[1].strip().replace(",", "")),
    "humaneval": ("openai/openai_humaneval", None, lambda row: "Write a solution to the following problem and make "
                  f"sure that it passes the tests:\n```python\n{row['prompt']}\n```", lambda row: None)}


def load_questions(name, count):
    """[(question, answer or None)]: nano's test split; math500, gsm8k or humaneval from the hub, or with ":PATH" from
    a copy of their files; or a file of JSON lines. ValueError names what cannot be read."""
    if count < 1:
        raise ValueError(f"limit = {count}: measure at least one prompt")
    public, _, path = name.partition(":")
    if name == "nano":
        return [(question, answer) for question, _, answer in problems("test", count)]
    if os.path.isfile(name):
        return read_questions(name, count)
    if public not in PUBLIC:
        raise ValueError(f"prompts = {name!r} is none of nano, {', '.join(PUBLIC)}, nor a file of JSON lines nor "
                         "random:64:256")
    if path and not os.path.exists(path):
        raise ValueError(f"prompts = {name!r}: there is no file or folder {path!r}")
    hub, part, question, answer = PUBLIC[public]
    found = []
    try:
        for row in itertools.islice(read_source(path or hub, "test", part), count):
            found.append((question(row), answer(row)))
    except (LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"{path or hub}, row {len(found) + 1} is none of {public}: {error!r}") from None
    return found


def load_prompts(name, count, model, tokenizer):
    """Prompts of load_questions, or random ids of log-uniform lengths. A target without a tokenizer, as random ones
    are, can only have random ids."""
    if name.startswith("random:") and count > 0:
        try:
            shortest, longest = map(int, name.split(":")[1:])
        except ValueError:
            raise ValueError(f"prompts = {name!r}: write random:SHORTEST:LONGEST, both in tokens") from None
        r = random.Random(0)
        return [Prompt([r.randrange(model.config.vocab_size) for _ in range(n)], None) for n in
                (round(shortest * (longest / shortest) ** (i / max(1, count - 1))) for i in range(count))]
    found = load_questions(name, count)
    if tokenizer is None:
        raise ValueError(f"the target {target!r} has no tokenizer: use --prompts=random:64:256")
    return [Prompt(chat_prompt(tokenizer, question, thinking), answer) for question, answer in found]


def read_questions(path, count):
    """[(question, answer or None)] of a file of JSON lines. ValueError names the line that is none."""
    found = []
    with open(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip() and len(found) < count:
                try:
                    row = json.loads(line)
                    question = row.get("question") or row.get("problem") or row["prompt"]
                    found.append((question, row.get("answer")))
                except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                    raise ValueError(f'{path}, line {number}: no JSON object with a "question" ({error!r})') from None
    if not found:
        raise ValueError(f"{path} holds no prompts")
    return found


def is_correct(text, answer):
    """Whether the boxed answer of a text is the known one, as text or as mathematics."""
    given = boxed(text)
    if given is None or str(answer).strip() == given.strip():
        return given is not None
    from math_verify import parse, verify  # imported here, as it costs a second that most runs need not pay
    return bool(verify(parse(f"${answer}$"), parse(f"${given}$")))

# ----------------------------------------------------------------------------------------------------------------------
# drafters for measurement


def random_drafter(model):
    """An untrained drafter for a target: five layers of its widths, its full-attention layers as taps. For Qwen3.5-0.8B
    that is Phase 1.2's shape."""
    c = model.config
    last = c.num_hidden_layers - 2
    taps = [i for i, kind in enumerate(c.layer_types[:last + 1]) if kind == "full_attention"] or [last]
    torch.manual_seed(0)
    draft = DFlashDraftModel(drafter_config(c, 5, taps, c.vocab_size - 1, c.num_attention_heads,
                                            c.num_key_value_heads, c.head_dim, c.intermediate_size))
    return pack_linears(draft.to(model.embed_tokens.weight).requires_grad_(False).eval())


class Oracle:
    """Replays the known continuation of a prompt and makes each guess wrong with probability 1 - p, so that tau is
    1 + p + .. + p^(K-1) with any target. A drafter given along is run and its guesses dropped: then a round costs what
    it does with that drafter. One Oracle serves many prompts, each with a call of `know`."""
    def __init__(self, model, drafter=None, block_size=16):
        self.block_size, self.drafter, self.vocab = block_size, drafter, model.config.vocab_size
        self.taps, device = drafter.taps if drafter else (), model.embed_tokens.weight.device
        self.line = torch.zeros(model.config.max_position_embeddings, dtype=torch.long, device=device)
        self.ahead = torch.arange(1, block_size, device=device)

    def know(self, ids, continuation, p):
        """The tokens from position len(ids) on, and the share p that will be guessed right; returns self."""
        line = torch.tensor(continuation)
        wrong = torch.rand(len(line), generator=torch.Generator().manual_seed(len(ids))) >= p
        self.line[len(ids):len(ids) + len(line)] = torch.where(wrong, (line + 1) % self.vocab, line)
        return self

    def new_state(self, *shape):
        return self.drafter.new_state(*shape) if self.drafter else None

    def remember(self, *features):
        if self.drafter:
            self.drafter.remember(*features)

    def propose(self, anchor, target, state, pos, pick):
        if self.drafter:
            self.drafter.propose(anchor, target, state, pos, pick)
        return self.line.index_select(0, pos + self.ahead)[None]


def chance(tau, K=16):
    """The p of an Oracle whose rounds are tau tokens long on average, by bisection."""
    low, high = 0.0, 1.0
    for _ in range(50):
        p = (low + high) / 2
        low, high = (p, high) if sum(p ** k for k in range(K)) < tau else (low, p)
    return high


class Independent:
    """A drafter whose guesses are samples of its own at a temperature, with noise that the target does not share."""
    def __init__(self, drafter, temperature, seed):
        self.drafter, self.temperature, self.seed = drafter, temperature, seed
        self.block_size, self.taps = drafter.block_size, drafter.taps
        self.new_state, self.remember = drafter.new_state, drafter.remember

    def propose(self, anchor, target, state, pos, pick):
        at = pos + torch.arange(1, self.block_size, device=pos.device)
        noise, s = gumbel(-1 - self.seed, at, target.config.vocab_size), Sampling(self.temperature)
        return self.drafter.propose(anchor, target, state, pos, lambda x: choose(x, s, self.temperature, noise))

# ----------------------------------------------------------------------------------------------------------------------
# acceptance


def sampling():
    return Sampling(temperature, top_k, top_p, seed, draft_temperature)


def load(count, kind=None):
    """(target, drafter, tokenizer or None, prompts, stop ids) by the keys; count: of prompts where limit is 0."""
    model = load_target(target, device, kind or dtype)
    tokenizer = None if target.startswith("random:") else load_tokenizer(target)
    questions = load_prompts(prompts, limit or count, model, tokenizer)
    draft = random_drafter(model) if drafter == "random" else load_drafter(drafter, model.config, device, kind or dtype)
    if compile:
        model.compile()
        draft.compile_decoding()
    return model, draft, tokenizer, questions, stop_ids(tokenizer) if tokenizer else ()


def setup(questions, stops, **more):
    """What a report was made from. Runs compare when the keys of SAME are equal; a journal is resumed when all are."""
    digest = hashlib.sha256(json.dumps([vars(q) for q in questions]).encode()).hexdigest()[:16]
    return {"target": target, "drafter": drafter, "device": device, "dtype": dtype, "compile": compile,
            "prompts": prompts, "count": len(questions), "digest": digest, "max_new_tokens": max_new_tokens,
            "stops": sorted(stops), "thinking": thinking} | vars(sampling()) | more


def progress(items):
    return tqdm(items, unit="prompt", disable=not sys.stderr.isatty())


def measure(decode, questions, journal):
    """One row a prompt: {"prompt", "answer", arm: {"tokens", "rounds", "seconds", "repeats"}}; rounds: a list of
    [guesses accepted, tokens returned]; seconds: the median of its repeats.

    decode: {arm: (function of token ids that returns run()'s (tokens, rounds, seconds), repeats)}. Arms take turns in
    alternating order, so that none has the warmer machine, after a warm-up of each."""
    cold = set(decode)

    def say(name, ids):
        if name in cold:
            cold.remove(name)
            decode[name][0](questions[0].ids)
        return decode[name][0](ids)

    def make(i):
        found = {name: [] for name in decode}
        for j in range(max(count for _, count in decode.values())):
            for name in list(decode)[::1 if (i + j) % 2 else -1]:
                found[name] += [say(name, questions[i].ids)] if j < decode[name][1] else []
        return {"answer": questions[i].answer} | {name: {
            "tokens": runs[0][0], "rounds": [[r.accepted, r.tokens] for r in runs[0][1]],
            "seconds": median(seconds for _, _, seconds in runs), "repeats": [seconds for _, _, seconds in runs]}
            for name, runs in found.items()}
    return [journal.row(i, make) for i in progress(range(len(questions)))]


def arms_of(model, draft, stops, repeats=1):
    """measure()'s arms: drafted, the target alone at the same shape, which must say the same, and the target alone by
    single steps, the speed to beat."""
    s, decoders = sampling(), {}

    def arm(drafter, rows):
        return lambda ids: run(model, drafter, ids, max_new_tokens, stops, rows, s, decoders=decoders)
    return {"speculative": (arm(draft, None), repeats), "alone": (arm(None, draft.block_size), 1),
            "target": (arm(None, 1), repeats)}


def rate(row, arm):
    """Tokens a second of an arm's rounds on one prompt; 0 where its first token, which no round made, was its last."""
    return (len(row[arm]["tokens"]) - 1) / max(1e-9, row[arm]["seconds"])


def texts(results, tokenizer, arm):
    """[(text, known answer)] of an arm, for prompts whose answer is known."""
    return [(tokenizer.decode(row[arm]["tokens"], skip_special_tokens=True), row["answer"]) for row in results
            if row["answer"] is not None]


def share(flags):
    """The share of true ones; None of none."""
    flags = list(flags)
    return sum(flags) / len(flags) if flags else None


def statistics(results, tokenizer, block_size):
    """The report's figures, from measure()'s rows."""
    per_prompt = [row["speculative"]["rounds"] for row in results if row["speculative"]["rounds"]]
    accepted = [n for rounds in per_prompt for n, _ in rounds]
    lengths = [len(tokens) for rounds in per_prompt for _, tokens in rounds]

    def speed(arm):
        return (sum(len(row[arm]["tokens"]) - 1 for row in results)
                / max(1e-9, sum(row[arm]["seconds"] for row in results)))

    return {
        "command": "acceptance", "prompts": len(results), "rounds": len(lengths), "tokens": sum(lengths),
        "tau_micro": sum(lengths) / max(1, len(lengths)),
        "tau_macro": sum(map(tau, per_prompt)) / max(1, len(per_prompt)),
        "slots": [sum(n >= k for n in accepted) / max(1, len(accepted)) for k in range(1, block_size)],
        "lengths": [lengths.count(n) for n in range(1, block_size + 1)],
        "identical": share(row["speculative"]["tokens"] == row["alone"]["tokens"] for row in results),
        "identical_to_steps": share(row["speculative"]["tokens"] == row["target"]["tokens"] for row in results),
        "accuracy": {arm: share(is_correct(*pair) for pair in texts(results, tokenizer, arm))
                     for arm in ("target", "speculative")},
        "tokens_per_s": {"target": speed("target"), "target_same_shape": speed("alone"),
                         "speculative": speed("speculative")},
        "speedup": speed("speculative") / max(1e-9, speed("target"))}


class Journal:
    """Rows of one command, kept line by line in out_dir/NAME.part.jsonl, so that an interrupted one can --resume.

    Its first line is the setup. ValueError when that of an earlier run is another, as its rows would not fit."""
    def __init__(self, name, setup):
        self.path, self.rows = os.path.join(out_dir, f"{name}.part.jsonl"), {}
        with open(self.path, "ab+" if resume else "wb+") as f:
            f.seek(0)
            lines = [line for line in f if line.endswith(b"\n")]  # a last line may be torn
            f.truncate(sum(map(len, lines)))
        setup = json.loads(json.dumps(setup))  # as it will be read
        header, *rows = map(json.loads, lines or [json.dumps(setup)])
        if other := sorted(k for k in setup.keys() | header.keys() if header.get(k) != setup.get(k)):
            raise ValueError(f"{self.path} was made with {other[0]} = {header.get(other[0])!r}, now it is "
                             f"{setup.get(other[0])!r}: give the same keys, or another --out_dir, or no --resume")
        self.rows = {row["prompt"]: row for row in rows}
        if not lines:
            self.append(setup)

    def append(self, row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def row(self, i, make):
        """Row i: kept, or made by make(i) and kept."""
        if i not in self.rows:
            self.rows[i] = {"prompt": i} | make(i)
            self.append(self.rows[i])
        return self.rows[i]

    def close(self, lines):
        """The rows become NAME.jsonl, in the form of lines."""
        write(self.path.replace(".part.", "."), "".join(json.dumps(line) + "\n" for line in lines))
        os.remove(self.path)


def write(path, text):
    """A text file, whole or not at all."""
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def tau(rounds):
    """Tokens a round, of a prompt's [[guesses accepted, tokens returned], ..]."""
    return sum(len(tokens) for _, tokens in rounds) / len(rounds)


def transcript(model, draft, tokenizer, ids, stops):
    """The rounds of one answer as text: [{"anchor", "guesses": all K - 1, "accepted": how many, "own": the target's own
    token after them, None where the answer ended before it}]."""
    decoders, made = {}, []

    def note(tokens, result):
        if len(tokens) > len(result.tokens):  # the prompt's own token is in no round
            block = next(iter(decoders.values())).block[0].tolist()  # this round's: the next has not begun
            anchor, *guesses = [tokenizer.decode([t]) for t in block]
            own = tokenizer.decode(result.tokens[-1:]) if len(result.tokens) > result.accepted else None
            made.append({"anchor": anchor, "guesses": guesses, "accepted": result.accepted, "own": own})

    run(model, draft, ids, max_new_tokens, stops, None, sampling(), note, decoders)
    return made


def acceptance():
    """tau, acceptance by slot, identity of outputs, accuracy and speed of a drafter."""
    model, draft, tokenizer, questions, stops = load(80)
    made_from = setup(questions, stops)
    journal = Journal("acceptance", made_from)
    results = measure(arms_of(model, draft, stops), questions, journal)
    report = statistics(results, tokenizer, draft.block_size)
    rounds = {row["prompt"]: row["speculative"]["rounds"] for row in results}
    timed = sorted((i for i, made in rounds.items() if made), key=lambda i: tau(rounds[i]))
    report["transcript"] = None
    if tokenizer and timed:
        i = timed[len(timed) // 2]  # the prompt of median tau
        report["transcript"] = {"prompt": i, "rounds": transcript(model, draft, tokenizer, questions[i].ids, stops)}
    plots.acceptance(os.path.join(out_dir, "acceptance.png"), report)
    journal.close({"prompt": row["prompt"], "round": i, "accepted": accepted, "tokens": tokens}
                  for row in results for i, (accepted, tokens) in enumerate(row["speculative"]["rounds"]))
    print_card(card(model, draft, report))
    percent = {arm: "unknown" if value is None else f"{value:.1%}" for arm, value in report["accuracy"].items()}
    for name, value in (
            ("tau, micro", f"{report['tau_micro']:.3f}   {report['tokens']} tokens in {report['rounds']} rounds"),
            ("tau, macro", f"{report['tau_macro']:.3f}   mean over {report['prompts']} prompts"),
            ("accepted up to slot", " ".join(f"{k}:{share:.2f}" for k, share in enumerate(report["slots"], 1))),
            ("identical outputs", f"{report['identical']:.1%}   to the target alone at the same shape"),
            ("", f"{report['identical_to_steps']:.1%}   to the target alone, one row a step"),
            ("accuracy", f"{percent['target']} target, {percent['speculative']} speculative"),
            ("tokens/s", ", ".join(f"{v:,.0f} {k}" for k, v in report["tokens_per_s"].items())),
            ("speedup", f"{report['speedup']:.2f}   over the target alone, one row a step")):
        print(f"{name:20} {value}")
    print(f"{'wrote':20} {out_dir}/acceptance.png, {out_dir}/acceptance.jsonl")
    return report, made_from

# ----------------------------------------------------------------------------------------------------------------------
# speedup


def card(model, draft, report):
    """What runs where, and what this device's copy bandwidth allows: seconds of a step and of a round that only read
    their weights, and the speedup of such rounds at the measured tau."""
    import speed as parts_of
    copy, reads = parts_of.bandwidth(device), parts_of.reads(model, draft)
    ceiling = report["tau_micro"] * reads["step"] / reads["round"]
    return {"device": parts_of.where(device), "dtype": dtype, "torch": torch.__version__,
            "parameters": {"target": sum(p.numel() for p in model.parameters()),
                           "drafter": sum(p.numel() for p in draft.parameters())},
            "bytes": reads, "copy_bytes_per_s": copy,
            "floor_seconds": {name: count / copy for name, count in reads.items()},
            "ceiling": ceiling, "share_of_ceiling": report["speedup"] / ceiling}


def print_card(c):
    p, size, floor = c["parameters"], c["bytes"], c["floor_seconds"]
    for name, value in (
            ("device", f"{c['device']}, {c['dtype']}, torch {c['torch']}; "
                       f"copies {c['copy_bytes_per_s'] / 1e9:,.1f} GB/s"),
            ("parameters", f"{p['target']:,} target, {p['drafter']:,} drafter"),
            ("target step", f"reads {size['step'] / 1e6:,.1f} MB of weights: {1e3 * floor['step']:.3f} ms at least"),
            ("round", f"reads {size['round'] / 1e6:,.1f} MB of weights: {1e3 * floor['round']:.3f} ms at least"),
            ("ceiling", f"{c['ceiling']:.2f}x at the measured tau, if both only read their weights")):
        print(f"{name:20} {value}")
    print()


def method(report, c):
    """The sentence that a published figure needs beside it."""
    kind = "greedy" if not temperature else f"temperature {temperature}, top_k {top_k}, top_p {top_p}, seed {seed}"
    return (f"Method: {report['prompts']} prompts of {prompts}, {kind}, at most {max_new_tokens} new tokens, thinking "
            f"{'on' if thinking else 'off'}; target {target}, drafter {drafter}; {dtype} on {c['device']}, torch "
            f"{c['torch']}{', compiled' if compile else ''}; baseline: the same code's fastest target-only mode, one "
            f"row a step; one sequence at a time, both arms in one process, prompt by prompt in alternating order "
            f"after a warm-up, median of {repeats}; every round is timed, the first draft too, the prefill is "
            f"not; tokens past a stop or the limit do not count.")


def timed_peer(theirs, ids, stops, K):
    """run()'s results for transformers' generate; its prefill, as a generation of one token, is subtracted."""
    began = time.perf_counter()
    peer_answer(theirs, ids, stops, K, 1)
    one = time.perf_counter() - began
    tokens = peer_answer(theirs, ids, stops, K)
    return tokens, [], max(0.0, time.perf_counter() - began - 2 * one)


def speedup():
    """Prompt by prompt, how much faster a drafter makes the fastest target-only mode, and that the outputs agree."""
    if repeats < 1:
        raise ValueError(f"repeats = {repeats}: time each prompt at least once")
    if hf and temperature:
        raise ValueError("--hf compares with transformers' greedy generate: leave --temperature at 0")
    model, draft, tokenizer, questions, stops = load(8 if hf else 24)
    made_from = setup(questions, stops, repeats=repeats, hf=hf)
    journal, arms = Journal("speedup", made_from), arms_of(model, draft, stops, repeats)
    if hf:
        theirs = transformers_peer(model)
        arms["transformers"] = (lambda ids: timed_peer(theirs, ids, stops, draft.block_size), repeats)
    results = measure(arms, questions, journal)
    timed = [row for row in results if row["speculative"]["rounds"] and row["target"]["rounds"]]
    if not timed:
        raise ValueError("every answer ended with its first token, so there is no round to time: use other prompts")
    points = [(tau(row["speculative"]["rounds"]), rate(row, "speculative") / rate(row, "target")) for row in timed]
    gains = [gain for _, gain in points]
    report = statistics(results, tokenizer, draft.block_size) | {
        "command": "speedup", "faster": sum(gain > 1 for gain in gains), "timed": len(timed),
        "geomean": math.exp(sum(map(math.log, gains)) / len(gains)),
        "min": min(gains), "median": median(gains), "max": max(gains),
        "boxed": {arm: share(boxed(text) is not None for text, _ in texts(results, tokenizer, arm))
                  for arm in ("target", "speculative")}}
    if hf:
        count, spent = (sum(x) for x in zip(*((len(r["transformers"]["tokens"]) - 1, r["transformers"]["seconds"])
                                              for r in results)))
        report["tokens_per_s"]["transformers"] = count / max(1e-9, spent)
        report["speedup_over_transformers"] = report["tokens_per_s"]["speculative"] * spent / max(1, count)
        report["identical_to_transformers"] = share(r["speculative"]["tokens"] == r["transformers"]["tokens"]
                                                    for r in results)
    report["card"] = card(model, draft, report)
    plots.speedup(os.path.join(out_dir, "speedup.png"), points, report)
    found = {row["prompt"]: point for row, point in zip(timed, points)}
    journal.close(row | dict(zip(("tau", "speedup"), found.get(row["prompt"], (None, None)))) for row in results)
    print_speedup(report)
    return report, made_from


def print_speedup(r):
    print_card(r["card"])
    percent = {(key, arm): "unknown" if value is None else f"{value:.1%}" for key in ("boxed", "accuracy")
               for arm, value in r[key].items()}
    late, gained = r["prompts"] - r["timed"], r["card"]["share_of_ceiling"]
    rows = [("faster", f"{r['faster']} of {r['prompts']} prompts" + f"; {late} ended at the first token" * (late > 0)),
            ("speedup a prompt", f"{r['geomean']:.2f}x geometric mean; {r['min']:.2f}x to {r['max']:.2f}x, "
                                 f"median {r['median']:.2f}x"),
            ("speedup in all", f"{r['speedup']:.2f}x in total time, {gained:.0%} of the ceiling"),
            ("tau", f"{r['tau_micro']:.3f} micro, {r['tau_macro']:.3f} macro; "
                    f"{r['tokens']} tokens in {r['rounds']} rounds"),
            ("identical outputs", f"{r['identical']:.1%} to the target alone at the same shape, "
                                  f"{r['identical_to_steps']:.1%} one row a step"),
            ("boxed an answer", f"{percent['boxed', 'target']} target, {percent['boxed', 'speculative']} speculative"),
            ("accuracy", f"{percent['accuracy', 'target']} target, {percent['accuracy', 'speculative']} speculative"),
            ("tokens/s", ", ".join(f"{v:,.0f} {k}" for k, v in r["tokens_per_s"].items()))]
    if "identical_to_transformers" in r:
        rows.append(("transformers", f"{r['speedup_over_transformers']:.2f}x over its generate, "
                                     f"{r['identical_to_transformers']:.1%} identical outputs"))
    for name, value in rows:
        print(f"{name:20} {value}")
    print(f"{'wrote':20} {out_dir}/speedup.png, {out_dir}/speedup.jsonl\n\n{method(r, r['card'])}")

# ----------------------------------------------------------------------------------------------------------------------
# exactness: decisions 1 to 3 as a command


def transformers_peer(model):
    """transformers' Qwen3.5 with the very weights of a Target, shared where the names allow it."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, logging
    logging.set_verbosity_error()  # that it has no kernels of its own here is said on every call otherwise
    c = model.config
    rope = {"rope_type": "default", "rope_theta": c.rope_theta, "partial_rotary_factor": c.partial_rotary_factor}
    text = {k: v for k, v in vars(c).items() if k not in rope} | {"layer_types": list(c.layer_types)}
    weight = model.embed_tokens.weight
    with torch.device(weight.device):
        theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**text, rope_parameters=rope, dtype=weight.dtype)).eval()
    weights = {k if k == "lm_head.weight" else "model." + k: v for k, v in model.state_dict().items()}
    weights.setdefault("lm_head.weight", model.head)
    theirs.load_state_dict(weights, assign=True)
    return theirs


@torch.inference_mode()
def peer_answer(theirs, ids, stops, K, count=None):
    """Tokens of transformers' own greedy generate, ended as ours are; count: at most, None: max_new_tokens."""
    limit = min(count or max_new_tokens, theirs.config.max_position_embeddings - len(ids) - K)
    x = torch.tensor([ids], device=device)
    out = theirs.generate(x, attention_mask=torch.ones_like(x), do_sample=False, max_new_tokens=limit,
                          eos_token_id=sorted(stops) or None, pad_token_id=0)
    return out[0, len(ids):].tolist()


@torch.inference_mode()
def margin(model, ids, a, b, s, K):
    """How far apart the scores of two tokens a and b are in the choice that follows ids: what rounding turned over is
    close, what a wrong state did need not be. None where a filter leaves only one of them."""
    n = len(ids)
    logits = model.prefill(torch.tensor([ids], device=device), DecodeState(model, 1, n + K, K))[1]
    noise = gumbel(s.seed, torch.tensor([n], device=device), logits.shape[-1]) if s.temperature else None
    scores = score(logits.float(), s, s.temperature, noise)[0]
    gap = (scores[a] - scores[b]).abs().item()
    return gap if math.isfinite(gap) else None


def compare(model, drafters, theirs, questions, stops, s, journal, kind):
    """{(drafter, against): [(first difference, margin) or None for each prompt]} and {drafter: tau} at one s."""
    K, found, counts, decoders = drafters["random"].block_size, {}, {}, {}
    oracles = {name: Oracle(model, block_size=K) for name in ("oracle", "wrong")}

    def make(key):
        ids, row = questions[int(key.split()[-1])].ids, {"differences": [], "rounds": {}}

        def say(arm, rows=None):
            return run(model, arm, ids, max_new_tokens, stops, rows, s, decoders=decoders)[:2]

        others = {"fixed shape": say(None, K)[0], "one row": say(None, 1)[0]}
        if theirs is not None and not s.temperature:
            others["transformers"] = peer_answer(theirs, ids, stops, K)
        for name, p in (("oracle", oracle), ("wrong", 0.0)):
            drafters[name] = oracles[name].know(ids, others["fixed shape"], p)
        for name, arm in drafters.items():
            tokens, made = say(arm)
            row["rounds"][name] = [sum(len(r.tokens) for r in made), len(made)]
            for against, other in others.items():
                i = first_difference(tokens, other)
                pair = [] if i is None else [x[i] for x in (tokens, other) if i < len(x)]
                gap = margin(model, ids + tokens[:i], *pair, s, K) if len(pair) == 2 else None
                row["differences"].append([name, against, None if i is None else (i, gap)])
        return row

    for i in progress(range(len(questions))):
        row = journal.row(f"{kind} {s.temperature} {i}", make)
        for name, against, difference in row["differences"]:
            found.setdefault((name, against), []).append(difference)
        for name, made in row["rounds"].items():
            counts.setdefault(name, []).append(made)
    return found, {name: sum(n for n, _ in made) / max(1, sum(n for _, n in made)) for name, made in counts.items()}


def exactness():
    """Whether output with a drafter equals (a) the target alone at the same shape, which it must, (b) the target alone
    by single steps and (c) transformers' greedy generate, which round otherwise."""
    rows, lines, journal = [], [], None
    for kind in dtypes:
        model, draft, _, questions, stops = load(4, kind)
        made_from = setup(questions, stops, dtype=dtypes, temperature=temperatures, oracle=oracle)
        journal = journal or Journal("exactness", made_from)
        drafters = {"random": draft} if drafter == "random" else {"random": random_drafter(model), "trained": draft}
        if draft.block_size != drafters["random"].block_size:
            raise ValueError(f"{drafter} drafts blocks of {draft.block_size}; exactness compares drafters of "
                             f"{drafters['random'].block_size}: give such a one, or --drafter=random")
        theirs = transformers_peer(model) if 0 in temperatures else None
        for t in temperatures:
            s = Sampling(t, top_k, top_p, seed, draft_temperature)
            found, taus = compare(model, dict(drafters), theirs, questions, stops, s, journal, kind)
            for (name, against), differences in found.items():
                seen = [d for d in differences if d]
                at, gap = max(seen, key=lambda d: d[1] or 0.0, default=(None, None))
                rows.append({"drafter": name, "temperature": t, "dtype": kind, "against": against,
                             "prompts": len(questions), "identical": 1 - len(seen) / len(questions), "margin": gap,
                             "position": at, "tau": taus[name]})
                lines.append(rows[-1] | {"differences": differences})
    journal.close(lines)
    print(f"{len(questions)} prompts; margin: between the scores of the two tokens that first differ, the largest\n")
    print(f"{'dtype':9} {'T':>4} {'drafter':8} {'tau':>6}  {'against':13} {'identical':>9} {'margin':>8} {'token':>6}")
    for r in rows:
        gap = ("-", r["position"] or "-") if r["margin"] is None else (f"{r['margin']:.4f}", r["position"])
        print(f"{r['dtype']:9} {r['temperature']:4} {r['drafter']:8} {r['tau']:6.2f}  {r['against']:13} "
              f"{r['identical']:9.1%} {gap[0]:>8} {gap[1]:>6}")
    return {"command": "exactness", "rows": rows}, made_from

# ----------------------------------------------------------------------------------------------------------------------
# curve: what a tau is worth


def curve():
    """Speedup over the target alone against tau, from oracles that cost what the drafter costs, and its own point."""
    model, draft, _, questions, stops = load(4)
    s, K, decoders = sampling(), draft.block_size, {}
    seer, made = Oracle(model, draft, K), 1 + 8 * K
    taus = {tau: chance(tau, K) for tau in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)}
    names = ["step", *taus] + ["drafter"] * (drafter != "random")
    results = {name: [] for name in names}

    def timed(arm, ids, stops=(), rows=None):
        known = len(decoders)
        result = run(model, arm, ids, made, stops, rows, s, decoders=decoders)
        # a new shape is compiled and captured in its first run, so that one is its warm-up
        return result if len(decoders) == known else run(model, arm, ids, made, stops, rows, s, decoders=decoders)

    for i, prompt in enumerate(progress(questions)):
        ids = prompt.ids
        say = timed(None, ids, rows=K)[0]
        for name in names[::1 if i % 2 else -1]:
            if name == "step":
                found = timed(None, ids, rows=1)
            elif name == "drafter":
                found = timed(draft, ids, stops)
            else:
                found = timed(seer.know(ids, say, taus[name]), ids)
            results[name].append((sum(len(r.tokens) for r in found[1]), len(found[1]), found[2]))
    steps = [elapsed / rounds for _, rounds, elapsed in results.pop("step")]
    points = []
    for name, found in results.items():
        count, rounds, seconds = (sum(x) for x in zip(*found))
        if not rounds:  # every answer of the trained drafter ended with its first token
            continue
        alone = sum(n * step for (n, *_), step in zip(found, steps))
        points.append({"drafter": "oracle" if name != "drafter" else "trained", "tau": count / rounds,
                       "speedup": alone / seconds, "round_s": seconds / rounds, "step_s": alone / count})
    print(f"{'drafter':8} {'tau':>6} {'speedup':>8} {'round':>9} {'step':>9}")
    for p in points:
        print(f"{p['drafter']:8} {p['tau']:6.2f} {p['speedup']:7.2f}x {1e3 * p['round_s']:6.2f} ms "
              f"{1e3 * p['step_s']:6.2f} ms")
    plots.curve(os.path.join(out_dir, "curve.png"), {"oracles": points})
    print(f"wrote {out_dir}/curve.png")
    return {"command": "curve", "prompts": len(questions), "rows": points}, setup(questions, stops)

# ----------------------------------------------------------------------------------------------------------------------
# coupling: whose noise should a guess have


def coupling():
    """tau of sampled output for guesses that are greedy, samples of their own, or coupled with the target's noise."""
    model, draft, _, questions, stops = load(48)
    rows = []
    for t in temperatures:
        kinds = [("greedy", 0.0)] + [(kind, warm) for warm in (0.3, 0.5, 0.7, 1.0) for kind in
                                     ("independent", "coupled") if t]
        for kind, warm in kinds:
            lengths = []
            for i, prompt in enumerate(progress(questions)):
                s = Sampling(t, top_k, top_p, seed + i, warm if kind == "coupled" else 0.0)
                arm = Independent(draft, warm, seed + i) if kind == "independent" else draft
                lengths += [len(r.tokens) for r in run(model, arm, prompt.ids, max_new_tokens, stops, None, s)[1]]
            rows.append({"temperature": t, "guesses": kind, "draft_temperature": warm,
                         "tau": sum(lengths) / max(1, len(lengths)), "rounds": len(lengths)})
            print("T {temperature:<4} {guesses:12} at {draft_temperature:<4} tau {tau:6.3f}  {rounds} rounds".format(
                **rows[-1]), flush=True)
    return ({"command": "coupling", "prompts": len(questions), "rows": rows},
            setup(questions, stops, temperature=temperatures))

# ----------------------------------------------------------------------------------------------------------------------
# speed


def speed():
    """Steps, rounds, prefill, kernel and training steps, each beside its floor and transformers: see speed.py."""
    import speed as parts_of
    model, draft, _, questions, stops = load(1)
    return {"command": "speed", "target": target, "compile": compile} | parts_of.measure(
        model, draft, transformers_peer(model), device, dtype, parts), setup(questions, stops)

# ----------------------------------------------------------------------------------------------------------------------
# serve


def serve():
    """A server with a drafter against one without, as their users see them: see serve.py."""
    import serve as client
    if not base_url or not baseline_url or concurrency < 1 or timeout <= 0:
        raise ValueError("give --base_url and --baseline_url, each up to /v1, and concurrency and timeout above 0")
    found = load_questions(prompts, limit or 16)
    servers = {arm: (url.rstrip("/"), served_model or client.model_name(url.rstrip("/"), timeout))
               for arm, url in (("speculative", base_url), ("baseline", baseline_url))}
    made_from = setup([Prompt(*pair) for pair in found], ()) | {
        "stops": "the servers'", "target": [model for _, model in servers.values()], "drafter": base_url,
        "device": "servers", "dtype": "servers", "baseline_url": baseline_url, "concurrency": concurrency}
    body = {"max_tokens": max_new_tokens, "temperature": temperature, "stream": True, "seed": seed, "top_p": top_p,
            "stream_options": {"include_usage": True}, "chat_template_kwargs": {"enable_thinking": thinking}}
    body |= {"top_k": top_k} if top_k else {}  # not in OpenAI's form, but in both engines'
    journal = Journal("serve", made_from)
    rows = client.measure(servers, body, [question for question, _ in found], concurrency, timeout, journal, progress)
    report = client.statistics(rows, [answer for _, answer in found], is_correct)
    answers = {arm: [answer for row in rows for answer in row[arm]["answers"]] for arm in servers}
    journal.close({"prompt": i} | {arm: answers[arm][i] for arm in servers} for i in range(len(found)))
    client.show(report)
    print(f"\nMethod: {len(found)} prompts of {prompts}, temperature {temperature}, at most {max_new_tokens} new "
          f"tokens, thinking {'on' if thinking else 'off'}; {concurrency} at a time, groups sent to both servers in "
          f"alternating order after a warm-up; streamed, timed at the client, prefill and network included; failed "
          f"requests are in no figure.")
    return report, made_from

# ----------------------------------------------------------------------------------------------------------------------
# report: runs side by side

SAME = ("digest", "count", "max_new_tokens", "stops", "thinking", "temperature", "top_k", "top_p", "seed")


def read_run(path):
    """A run's OUT_DIR/COMMAND.json. ValueError when it is none, or is only the line that a command printed."""
    try:
        with open(path) as f:
            run = json.load(f)
        if "setup" not in run:
            raise ValueError("it has no setup")
    except (OSError, ValueError, TypeError) as error:
        raise ValueError(f"{path} is no report ({error}): give the COMMAND.json files that commands leave in their "
                         "out_dir") from None
    return run


def numbers(run, prefix=""):
    """{name: number, or (number, low, high)} of a report, those of its inner dicts as "outer, inner"."""
    found = {}
    for key, value in run.items():
        if isinstance(value, dict) and value.keys() == {"value", "low", "high"}:
            found[prefix + key] = tuple(value.values())
        elif isinstance(value, dict) and key not in ("setup", "card"):
            found |= numbers(value, f"{prefix}{key}, ")
        elif isinstance(value, (int, float)):
            found[prefix + key] = value
    return found


def show(value):
    """A figure as a cell of the table."""
    if isinstance(value, tuple):
        return "-" if value[0] is None else "{} [{}, {}]".format(*map(show, value))
    return "-" if value is None else f"{value:,}" if isinstance(value, int) else f"{value:,.3f}"


def report(paths):
    """Runs of the same prompts, limits and stop rules as a Markdown table and a picture; ValueError for others."""
    if len(paths) < 2:
        raise ValueError("report compares at least two runs: python bench.py report A.json B.json")
    runs = [read_run(path) for path in paths]
    setups, found = [made["setup"] for made in runs], [numbers(made) for made in runs]
    for path, made_from in zip(paths, setups):
        if other := [k for k in SAME if made_from.get(k) != setups[0].get(k)]:
            raise ValueError(f"{paths[0]} and {path} cannot be compared, {other[0]} is {setups[0].get(other[0])!r} and "
                             f"{made_from.get(other[0])!r}: measure both with the same keys")
    names = list(dict.fromkeys(name for each in found for name in each))
    lines = [["", *paths], ["---"] * (1 + len(paths)), ["command", *(made["command"] for made in runs)]]
    lines += [[key, *(str(made.get(key, "-")) for made in setups)] for key in ("target", "drafter", "device", "dtype")]
    lines += [[name, *(show(each.get(name)) for each in found)] for name in names]
    table = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    write(os.path.join(out_dir, "report.md"), table)
    plots.report(os.path.join(out_dir, "report.png"), paths, found)
    print(f"{table}\nwrote {out_dir}/report.md, {out_dir}/report.png")
    return {"command": "report", "runs": paths, "rows": {n: [each.get(n) for each in found] for n in names}}, setups[0]


# ----------------------------------------------------------------------------------------------------------------------
# figures: the README's


FIGURES = {"acceptance": "logs/acceptance_nano.json", "nano pair, two CPU cores": "logs/curve_nano.json",
           "0.8B shape, random weights, one H200": "logs/curve_h200.json"}


def figures(folder="logs"):
    """Draws the README's pictures from the reports in the repository."""
    runs = {}
    for name, path in FIGURES.items():
        with open(path) as f:
            runs[name] = json.load(f)
    paths = [os.path.join(folder, name) for name in ("acceptance.png", "curve.png")]
    plots.acceptance(paths[0], runs.pop("acceptance"))
    plots.curve(paths[1], {name: run["rows"] for name, run in runs.items()})
    print(f"drew {', '.join(paths)} from {', '.join(FIGURES.values())}")
    return {"command": "figures", "wrote": paths}, {}


COMMANDS = {"acceptance": acceptance, "speedup": speedup, "exactness": exactness, "curve": curve, "coupling": coupling,
            "speed": speed, "serve": serve, "report": report, "figures": figures}
RESUMABLE = ("acceptance", "speedup", "exactness", "serve")


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        if command in ("-h", "--help"):
            configure(globals(), ["--help"])
        sys.exit(f"usage: python bench.py {'|'.join(COMMANDS)} [config.py] [--key=value]; --help lists the keys")
    files = [word for word in sys.argv[2:] if command == "report" and word.endswith(".json") and word[0] != "-"]
    configure(globals(), [word for word in sys.argv[2:] if word not in files])
    try:
        if resume and command not in RESUMABLE:
            raise ValueError(f"{command} cannot be resumed, only {', '.join(RESUMABLE)}: leave --resume away")
        os.makedirs(out_dir, exist_ok=True)
        found, made_from = COMMANDS[command](*[files] if command == "report" else [])
        write(os.path.join(out_dir, f"{command}.json"), json.dumps(found | {"setup": made_from}) + "\n")
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        hint = f"the same command with --resume goes on from {out_dir}" if command in RESUMABLE else "nothing is kept"
        sys.exit(f"interrupted: {hint}")
    print(json.dumps(found))
    same = {"acceptance": lambda: [found["identical"]],
            "exactness": lambda: [r["identical"] for r in found["rows"] if r["against"] == "fixed shape"]}
    if command in same and min(same[command]()) < 1:
        sys.exit("error: an output differs from the target's own at the same shape; that must not be: please report it")


if __name__ == "__main__":
    main()
