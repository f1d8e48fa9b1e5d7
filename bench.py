"""
Measures a drafter. Each command prints a table and, as its last line, JSON; figures and raw rounds go to out_dir.

    python bench.py acceptance                                   # the shipped nano pair on its held-out prompts
    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py acceptance --prompts=FILE.jsonl              # lines with "question" and, if known, "answer"
    python bench.py exactness                                    # is the output the target's own, to the bit
    python bench.py exactness --target=random:0.8b:4 --drafter=random --prompts=random:64:256
    python bench.py curve                                        # speedup against tau, from drafters right by chance
    python bench.py coupling                                     # sampling: which guesses agree with the target most
    python bench.py speed --target=random:0.8b --drafter=random --prompts=random:64:256   # against transformers
    python bench.py speed --parts=training                       # a training step against its arithmetic; ten minutes

tau, the acceptance length, is the number of tokens returned in a round, the target's own included. micro: all tokens
over all rounds. macro: the mean over prompts of each prompt's mean. Tokens past the end of an answer do not count, and
neither does the prompt's own first token, which no round made. The baseline is our fastest target-only mode, one row a
step; both arms run prompt by prompt in one process, in alternating order. Every round of both is timed, the drafter's
first guess too; the prefill, which they share, is not.
"""
import json
import math
import os
import random
import sys
from dataclasses import dataclass

import torch
from tqdm import tqdm

from configurator import configure
from data.nano.problems import boxed, problems
from draft_decode import Sampling, choose, gumbel, run, score
from model import DFlashDraftModel, drafter_config, load_drafter
from target import DecodeState, chat_prompt, load_target, load_tokenizer, stop_ids

target = "data/nano/target"             # folder of the target, or random:0.8b and the like
drafter = "data/nano/drafter-dflash"    # folder of the drafter, or random: untrained, of the target's own widths
prompts = "nano"                        # nano: its held-out problems; a file of JSON lines; random:SHORTEST:LONGEST
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
out_dir = "out/bench"                   # figures and raw results
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
parts: tuple[str] = ("decoding", "prefill", "kernel")       # of speed; also training
compile = False                         # compile the target's layers: a minute or two once, then faster decoding

# ----------------------------------------------------------------------------------------------------------------------
# prompts and answers


@dataclass
class Prompt:
    """Token ids to continue, and the known answer, if any."""
    ids: list
    answer: str | None


def load_prompts(name, count, model, tokenizer):
    """Prompts: nano's test split, a JSON lines file, or random ids of log-uniform lengths; ValueError names a bad
    line. A target without a tokenizer, as random ones are, can only have random ids."""
    if count < 1:
        raise ValueError(f"limit = {count}: measure at least one prompt")
    if name.startswith("random:"):
        try:
            shortest, longest = map(int, name.split(":")[1:])
        except ValueError:
            raise ValueError(f"prompts = {name!r}: write random:SHORTEST:LONGEST, both in tokens") from None
        r = random.Random(0)
        return [Prompt([r.randrange(model.config.vocab_size) for _ in range(n)], None) for n in
                (round(shortest * (longest / shortest) ** (i / max(1, count - 1))) for i in range(count))]
    if tokenizer is None:
        raise ValueError(f"the target {target!r} has no tokenizer: use --prompts=random:64:256")
    if name == "nano":
        found = [(question, answer) for question, _, answer in problems("test", count)]
    elif os.path.isfile(name):
        found = read_questions(name, count)
    else:
        raise ValueError(f"prompts = {name!r} is neither 'nano' nor a file of JSON lines nor random:64:256")
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
    return draft.to(model.embed_tokens.weight).requires_grad_(False).eval()


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


def progress(items):
    return tqdm(items, unit="prompt", disable=not sys.stderr.isatty())


def measure(model, draft, questions, stops):
    """One dict a prompt: tokens, rounds and seconds of the drafted arm, of the target alone at the same shape, which
    must say the same, and of the target alone by single steps, the speed to beat."""
    results, s = [], sampling()
    arms = {"speculative": (draft, None), "alone": (None, draft.block_size), "target": (None, 1)}
    decoders = {}
    for arm, rows in arms.values():
        run(model, arm, questions[0].ids, max_new_tokens, stops, rows, s, decoders=decoders)  # warm-up
    for i, prompt in enumerate(progress(questions)):
        row = {"prompt": i, "answer": prompt.answer}
        for name in list(arms)[::1 if i % 2 else -1]:  # alternating, so that neither arm has the warmer machine
            row[name] = run(model, arms[name][0], prompt.ids, max_new_tokens, stops, arms[name][1], s,
                            decoders=decoders)
        results.append(row)
    return results


def statistics(results, tokenizer, block_size):
    """The report's figures, from measure()'s rows."""
    rounds = [r for row in results for r in row["speculative"][1]]
    per_prompt = [[len(r.tokens) for r in row["speculative"][1]] for row in results if row["speculative"][1]]
    lengths = [n for ns in per_prompt for n in ns]
    known = [row for row in results if row["answer"] is not None]

    def speed(arm):
        return sum(len(row[arm][0]) - 1 for row in results) / max(1e-9, sum(row[arm][2] for row in results))

    def accuracy(arm):
        hits = [is_correct(tokenizer.decode(row[arm][0], skip_special_tokens=True), row["answer"]) for row in known]
        return sum(hits) / len(hits) if hits else None

    return {
        "command": "acceptance", "prompts": len(results), "rounds": len(rounds), "tokens": sum(lengths),
        "tau_micro": sum(lengths) / max(1, len(lengths)),
        "tau_macro": sum(sum(ns) / len(ns) for ns in per_prompt) / max(1, len(per_prompt)),
        "slots": [sum(r.accepted >= k for r in rounds) / max(1, len(rounds)) for k in range(1, block_size)],
        "lengths": [lengths.count(n) for n in range(1, block_size + 1)],
        "identical": sum(row["speculative"][0] == row["alone"][0] for row in results) / len(results),
        "identical_to_steps": sum(row["speculative"][0] == row["target"][0] for row in results) / len(results),
        "accuracy": {"target": accuracy("target"), "speculative": accuracy("speculative")},
        "tokens_per_s": {"target": speed("target"), "target_same_shape": speed("alone"),
                         "speculative": speed("speculative")},
        "speedup": speed("speculative") / max(1e-9, speed("target"))}


def write(path, text):
    """A text file, whole or not at all."""
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def save_figure(path, draw):
    """The picture that draw(pyplot) returns, whole or not at all."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure = draw(plt)
    figure.savefig(path + ".tmp", format="png", dpi=120)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def plot(path, report):
    """Acceptance by slot, and the histogram of round lengths, as a picture."""
    def draw(plt):
        figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
        left.bar(range(1, len(report["slots"]) + 1), report["slots"])
        left.set(xlabel="slot of the block", ylabel="share of rounds that accept it", ylim=(0, 1))
        right.bar(range(1, len(report["lengths"]) + 1), report["lengths"])
        right.set(xlabel="tokens returned in a round", ylabel="rounds",
                  title=f"tau {report['tau_micro']:.2f} over {report['prompts']} prompts")
        return figure
    save_figure(path, draw)


def acceptance():
    """tau, acceptance by slot, identity of outputs, accuracy and speed of a drafter."""
    model, draft, tokenizer, questions, stops = load(80)
    results = measure(model, draft, questions, stops)
    report = statistics(results, tokenizer, draft.block_size)
    write(os.path.join(out_dir, "acceptance.jsonl"), "".join(
        json.dumps({"prompt": row["prompt"], "round": i, "accepted": r.accepted, "tokens": r.tokens}) + "\n"
        for row in results for i, r in enumerate(row["speculative"][1])))
    plot(os.path.join(out_dir, "acceptance.png"), report)
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
    return report


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
def peer_answer(theirs, ids, stops, K):
    """Tokens of transformers' own greedy generate, ended as ours are."""
    limit = min(max_new_tokens, theirs.config.max_position_embeddings - len(ids) - K)
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


def first_difference(a, b):
    """Index of the first token that differs in two lists, one of which may end early; None if they are equal."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b))) if a != b else None


def compare(model, drafters, theirs, questions, stops, s):
    """{(drafter, against): [(first difference, margin) or None for each prompt]} and {drafter: tau} at one s."""
    K, found, rounds, decoders = drafters["random"].block_size, {}, {}, {}
    oracles = {name: Oracle(model, block_size=K) for name in ("oracle", "wrong")}
    for prompt in progress(questions):
        ids = prompt.ids

        def say(arm, rows=None):
            return run(model, arm, ids, max_new_tokens, stops, rows, s, decoders=decoders)[:2]

        others = {"fixed shape": say(None, K)[0], "one row": say(None, 1)[0]}
        if theirs is not None and not s.temperature:
            others["transformers"] = peer_answer(theirs, ids, stops, K)
        for name, p in (("oracle", oracle), ("wrong", 0.0)):
            drafters[name] = oracles[name].know(ids, others["fixed shape"], p)
        for name, arm in drafters.items():
            tokens, made = say(arm)
            rounds.setdefault(name, []).extend(made)
            for against, other in others.items():
                i = first_difference(tokens, other)
                pair = [] if i is None else [x[i] for x in (tokens, other) if i < len(x)]
                gap = margin(model, ids + tokens[:i], *pair, s, K) if len(pair) == 2 else None
                found.setdefault((name, against), []).append(None if i is None else (i, gap))
    return found, {name: sum(len(r.tokens) for r in made) / max(1, len(made)) for name, made in rounds.items()}


def exactness():
    """Whether output with a drafter equals (a) the target alone at the same shape, which it must, (b) the target alone
    by single steps and (c) transformers' greedy generate, which round otherwise."""
    rows, lines = [], []
    for kind in dtypes:
        model, draft, _, questions, stops = load(4, kind)
        drafters = {"random": random_drafter(model)} | ({} if drafter == "random" else {"trained": draft})
        assert all(d.block_size == 16 for d in drafters.values())
        theirs = transformers_peer(model) if 0 in temperatures else None
        for t in temperatures:
            s = Sampling(t, top_k, top_p, seed, draft_temperature)
            found, tau = compare(model, dict(drafters), theirs, questions, stops, s)
            for (name, against), differences in found.items():
                seen = [d for d in differences if d]
                at, gap = max(seen, key=lambda d: d[1] or 0.0, default=(None, None))
                rows.append({"drafter": name, "temperature": t, "dtype": kind, "against": against,
                             "prompts": len(questions), "identical": 1 - len(seen) / len(questions), "margin": gap,
                             "position": at, "tau": tau[name]})
                lines.append(json.dumps(rows[-1] | {"differences": differences}) + "\n")
    write(os.path.join(out_dir, "exactness.jsonl"), "".join(lines))
    print(f"{len(questions)} prompts; margin: between the scores of the two tokens that first differ, the largest\n")
    print(f"{'dtype':9} {'T':>4} {'drafter':8} {'tau':>6}  {'against':13} {'identical':>9} {'margin':>8} {'token':>6}")
    for r in rows:
        gap = ("-", r["position"] or "-") if r["margin"] is None else (f"{r['margin']:.4f}", r["position"])
        print(f"{r['dtype']:9} {r['temperature']:4} {r['drafter']:8} {r['tau']:6.2f}  {r['against']:13} "
              f"{r['identical']:9.1%} {gap[0]:>8} {gap[1]:>6}")
    return {"command": "exactness", "rows": rows}

# ----------------------------------------------------------------------------------------------------------------------
# curve: what a tau is worth


def curve():
    """Speedup over the target alone against tau, from oracles that cost what the drafter costs, and its own point."""
    model, draft, _, questions, stops = load(4)
    s, arms = sampling(), {tau: chance(tau, draft.block_size) for tau in (1, 2, 3, 4, 5, 6, 8, 10, 12, 14, 16)}
    results = {name: [] for name in (*arms, "drafter")}
    seer, decoders = Oracle(model, draft, draft.block_size), {}

    def timed(arm, ids, count, stops=(), rows=None):
        return run(model, arm, ids, count, stops, rows, s, decoders=decoders)

    for i, prompt in enumerate(progress([questions[0], *questions])):  # the first time is the warm-up
        ids, made = prompt.ids, 1 + 8 * draft.block_size
        tokens, rounds, step = timed(None, ids, made, (), 1)
        say = timed(None, ids, made, (), draft.block_size)[0]
        rows = {tau: timed(seer.know(ids, say, p), ids, made)[1:] for tau, p in arms.items() if i or tau == 16}
        if drafter != "random":
            rows["drafter"] = timed(draft, ids, max_new_tokens, stops)[1:]
        if i:
            for name, (made_rounds, seconds) in rows.items():
                count = sum(len(r.tokens) for r in made_rounds)
                results[name].append((count, len(made_rounds), seconds, step / len(rounds)))
    points = []
    for name, found in results.items():
        if found:
            count, rounds, seconds, _ = (sum(x) for x in zip(*found))
            alone = sum(n * step for n, _, _, step in found)
            points.append({"drafter": "oracle" if name != "drafter" else "trained", "tau": count / rounds,
                           "speedup": alone / seconds, "round_s": seconds / rounds, "step_s": alone / count})
    print(f"{'drafter':8} {'tau':>6} {'speedup':>8} {'round':>9} {'step':>9}")
    for p in points:
        print(f"{p['drafter']:8} {p['tau']:6.2f} {p['speedup']:7.2f}x {1e3 * p['round_s']:6.2f} ms "
              f"{1e3 * p['step_s']:6.2f} ms")
    plot_curve(os.path.join(out_dir, "curve.png"), points)
    print(f"wrote {out_dir}/curve.png")
    return {"command": "curve", "prompts": len(questions), "rows": points}


def plot_curve(path, points):
    def draw(plt):
        figure, axis = plt.subplots(figsize=(6, 4), layout="constrained")
        for kind, style in (("oracle", "o-"), ("trained", "r*")):
            at = [(p["tau"], p["speedup"]) for p in points if p["drafter"] == kind]
            axis.plot(*zip(*at) if at else ((), ()), style, label=kind, markersize=14 if kind == "trained" else 5)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(xlabel="tau (tokens a round)", ylabel="speedup over the target alone, one row a step")
        axis.legend()
        return figure
    save_figure(path, draw)

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
    return {"command": "coupling", "prompts": len(questions), "rows": rows}


# ----------------------------------------------------------------------------------------------------------------------
# speed


def speed():
    """Steps, rounds, prefill, kernel and training steps, each beside its floor and transformers: see speed.py."""
    import speed as parts_of
    model, draft, *_ = load(1)
    return {"command": "speed", "target": target, "compile": compile} | parts_of.measure(
        model, draft, transformers_peer(model), device, dtype, parts)


COMMANDS = {"acceptance": acceptance, "exactness": exactness, "curve": curve, "coupling": coupling, "speed": speed}


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        if command in ("-h", "--help"):
            configure(globals(), ["--help"])
        sys.exit(f"usage: python bench.py {'|'.join(COMMANDS)} [config.py] [--key=value]; --help lists the keys")
    configure(globals(), sys.argv[2:])
    try:
        os.makedirs(out_dir, exist_ok=True)
        report = COMMANDS[command]()
    except ValueError as error:
        sys.exit(f"error: {error}")
    where = torch.cuda.get_device_name() if device.startswith("cuda") else f"{torch.get_num_threads()} CPU threads"
    print(json.dumps({"target": target, "drafter": drafter, "prompt_set": prompts, "device": where, "dtype": dtype,
                      "max_new_tokens": max_new_tokens, "torch": torch.__version__} | report))
    same = [report.get("identical", 1), *(r["identical"] for r in report.get("rows", ())
                                          if r.get("against") == "fixed shape")]
    if min(same) < 1:
        sys.exit("error: an output differs from the target's own at the same shape; that must not be: please report it")


if __name__ == "__main__":
    main()
