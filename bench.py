"""
Measures a drafter. Each command prints a table and, as its last line, JSON; figures and raw rounds go to out_dir.

    python bench.py acceptance                                   # the shipped nano pair on its held-out prompts
    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py acceptance --prompts=FILE.jsonl              # lines with "question" and, if known, "answer"

tau, the acceptance length, is the number of tokens returned in a round, the target's own included. micro: all tokens
over all rounds. macro: the mean over prompts of each prompt's mean. Tokens past the end of an answer do not count, and
neither does the prompt's own first token, which no round made. The baseline is our fastest target-only mode, one row a
step; both arms run prompt by prompt in one process, in alternating order. Every round of both is timed, the drafter's
first guess too; the prefill, which they share, is not.
"""
import json
import os
import sys

import torch
from tqdm import tqdm

from configurator import configure
from data.nano.problems import boxed, problems
from draft_decode import run
from model import load_drafter
from target import chat_prompt, load_target, load_tokenizer, stop_ids

target = "data/nano/target"             # folder of the target
drafter = "data/nano/drafter-dflash"    # folder of the drafter
prompts = "nano"                        # nano: its held-out problems; or a file of JSON lines
limit = 200                             # prompts at most
max_new_tokens = 512                    # of an answer
thinking = False                        # let a target that can think do so
out_dir = "out/bench"                   # figures and raw results
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations

# ----------------------------------------------------------------------------------------------------------------------
# prompts and answers


def load_prompts(name, count):
    """[(question, answer or None)] of the nano test split, or of a JSON lines file. ValueError names a bad line."""
    if count < 1:
        raise ValueError(f"limit = {count}: measure at least one prompt")
    if name == "nano":
        return [(question, answer) for question, _, answer in problems("test", count)]
    if not os.path.isfile(name):
        raise ValueError(f"prompts = {name!r} is neither 'nano' nor a file of JSON lines")
    found = []
    with open(name) as f:
        for number, line in enumerate(f, 1):
            if line.strip() and len(found) < count:
                try:
                    row = json.loads(line)
                    question = row.get("question") or row.get("problem") or row["prompt"]
                    found.append((question, row.get("answer")))
                except (json.JSONDecodeError, KeyError, AttributeError, TypeError) as error:
                    raise ValueError(f'{name}, line {number}: no JSON object with a "question" ({error!r})') from None
    if not found:
        raise ValueError(f"{name} holds no prompts")
    return found


def is_correct(text, answer):
    """Whether the boxed answer of a text is the known one, as text or as mathematics."""
    given = boxed(text)
    if given is None or str(answer).strip() == given.strip():
        return given is not None
    from math_verify import parse, verify  # imported here, as it costs a second that most runs need not pay
    return bool(verify(parse(f"${answer}$"), parse(f"${given}$")))

# ----------------------------------------------------------------------------------------------------------------------
# acceptance


def measure(model, draft, tokenizer, questions):
    """One dict a prompt: tokens, rounds and seconds of the drafted arm, of the target alone at the same shape, which
    must say the same, and of the target alone by single steps, the speed to beat."""
    stops, results = stop_ids(tokenizer), []
    arms = {"speculative": (draft, None), "alone": (None, draft.block_size), "target": (None, 1)}
    for arm, rows in arms.values():
        run(model, arm, chat_prompt(tokenizer, questions[0][0], thinking), 32, stops, rows)  # warm-up
    for i, (question, answer) in enumerate(tqdm(questions, unit="prompt", disable=not sys.stderr.isatty())):
        ids, row = chat_prompt(tokenizer, question, thinking), {"prompt": i, "answer": answer}
        for name in list(arms)[::1 if i % 2 else -1]:  # alternating, so that neither arm has the warmer machine
            row[name] = run(model, arms[name][0], ids, max_new_tokens, stops, arms[name][1])
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


def plot(path, report):
    """Acceptance by slot, and the histogram of round lengths, as a picture."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    left.bar(range(1, len(report["slots"]) + 1), report["slots"])
    left.set(xlabel="slot of the block", ylabel="share of rounds that accept it", ylim=(0, 1))
    right.bar(range(1, len(report["lengths"]) + 1), report["lengths"])
    right.set(xlabel="tokens returned in a round", ylabel="rounds",
              title=f"tau {report['tau_micro']:.2f} over {report['prompts']} prompts")
    figure.savefig(path + ".tmp", format="png", dpi=120)
    plt.close(figure)
    os.replace(path + ".tmp", path)


def acceptance(model, draft, tokenizer):
    """tau, acceptance by slot, identity of outputs, accuracy and speed of a drafter."""
    results = measure(model, draft, tokenizer, load_prompts(prompts, limit))
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


COMMANDS = {"acceptance": acceptance}


def main():
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command not in COMMANDS:
        if command in ("-h", "--help"):
            configure(globals(), ["--help"])
        sys.exit(f"usage: python bench.py {'|'.join(COMMANDS)} [config.py] [--key=value]; --help lists the keys")
    configure(globals(), sys.argv[2:])
    try:
        model, tokenizer = load_target(target, device, dtype), load_tokenizer(target)
        draft = load_drafter(drafter, model.config, device, dtype)
        os.makedirs(out_dir, exist_ok=True)
        report = COMMANDS[command](model, draft, tokenizer)
    except ValueError as error:
        sys.exit(f"error: {error}")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
