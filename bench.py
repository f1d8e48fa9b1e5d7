"""
Measures a drafter. Each command prints a table and, as its last line, a report in JSON; the report,
raw rounds and pictures go to out_dir.

    python bench.py acceptance                      # the shipped nano pair on held-out prompts
    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py acceptance --prompts=FILE.jsonl # lines with "question" and, if known, "answer"
    python bench.py acceptance --prompts=plain      # nano's arithmetic; or refusals
    python bench.py speedup                         # prompt by prompt, against the target alone
    python bench.py speedup --prompts=math500 --limit=64 --max_new_tokens=2048 --target=DIR \\
        --drafter=DIR --hf
    python bench.py exactness                       # is the output the target's own, to the bit
    python bench.py exactness --target=random:0.8b:4 --drafter=random --prompts=random:64:256
    python bench.py curve                           # what a tau is worth
    python bench.py throughput                      # of many sequences at once
    python bench.py speed --target=random:0.8b --drafter=random --prompts=random:64:256
    python bench.py speed --parts=training          # training steps against their arithmetic
    python bench.py serve --base_url=http://localhost:30000/v1 \\
        --baseline_url=http://localhost:30001/v1 --concurrency=8
    python bench.py bugs                            # what each silent bug costs; --only=decoding
    python bench.py figures                         # pictures and tables of the docs, from benchmarks/results/

Each command is a file of that name in benchmarks/, which begins with what it measures.
--prompts=math500:FILE takes a copy of a public data set; FILE may also be a folder.
"""
import json
import os
import sys

import torch

from benchmarks import (acceptance, bugs, curve, exactness, figures, serve, speed, speedup,
                        throughput)
from checkpoint import write_whole
from configurator import configure
from console import survive_closed_output

# what is measured
target = "data/nano/target"             # folder of the target, or random:0.8b and the like
drafter = "data/nano/drafter-dflash"    # folder of the drafter; random: an untrained one
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                         # compile the layers: a minute or two once, then faster
# on which prompts
prompts = "nano"                        # nano, plain, refusals, math500, gsm8k, humaneval,
                                        # FILE.jsonl, random:64:256
limit = 0                               # prompts at most; 0: as many as take about two minutes
max_new_tokens = 512                    # of an answer
slots: tuple[int] = ()                  # sequences decoded at once; empty: 1, throughput 1 to 32
thinking = False                        # let a target that can think do so
# how tokens are chosen
temperature = 0.0                       # of the target's choice; 0 is greedy
top_k = 0                               # choose among this many likeliest tokens; 0: all
top_p = 1.0                             # choose among the likeliest that hold this share; 1: all
seed = 0                                # of the noise
draft_temperature = 0.0                 # above 0: guesses share the target's noise
# of single commands
repeats = 3                             # speedup: of each prompt; their median counts
hf = False                              # speedup: also time transformers' own generate
temperatures: tuple[float] = (0.0, 0.7, 1.0)             # exactness: to compare at
dtypes: tuple[str] = ("float32", "bfloat16")             # exactness: to compare in
oracle = 0.8                            # exactness: probability that a guess of its oracle is right
parts: tuple[str] = ("decoding", "prefill", "kernel")    # speed: also training
assumed_tau = 5.34                      # speed: tokens a round; throughput: of its oracle
base_url = ""                           # serve: the server with a drafter, its address up to /v1
baseline_url = ""                       # serve: the server without one
served_model = ""                       # serve: the target's name there; empty: the first listed
concurrency = 1                         # serve: requests at a time
timeout = 600.0                         # serve: seconds until a request counts as failed
only: tuple[str] = ()                   # bugs: decoding, training, or names; empty: all
# where the results go
out_dir = "out/bench"                   # figures and raw results
resume = False                          # go on from what an interrupted command left in out_dir

COMMANDS = {
    "acceptance": acceptance.run,
    "speedup": speedup.run,
    "exactness": exactness.run,
    "curve": curve.run,
    "throughput": throughput.run,
    "speed": speed.run,
    "serve": serve.run,
    "bugs": bugs.run,
    "figures": figures.run,
}
RESUMABLE = ("acceptance", "speedup", "exactness", "serve", "bugs")


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        configure(globals(), ["--help"])
    if command not in COMMANDS:
        sys.exit(f"usage: python bench.py {'|'.join(COMMANDS)} [config.py] [--key=value]; "
                 "--help lists the keys")
    survive_closed_output()
    config = configure(globals(), words[1:])
    try:
        if config.resume and command not in RESUMABLE:
            raise ValueError(f"{command} cannot be resumed, only {', '.join(RESUMABLE)}: "
                             "leave --resume away")
        os.makedirs(config.out_dir, exist_ok=True)
        report, setup = COMMANDS[command](config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        hint = "nothing is kept"
        if command in RESUMABLE:
            hint = f"the same command with --resume goes on from {config.out_dir}"
        sys.exit(f"interrupted: {hint}")
    path = os.path.join(config.out_dir, f"{command}.json")
    write_whole(path, json.dumps(report | {"setup": setup}) + "\n")
    print(json.dumps(report))
    if outputs_differ(report):
        sys.exit("error: an output differs from the target's own at the same shape; "
                 "that must not be: please report it")


def outputs_differ(report):
    """Whether an output was not the target's own in forwards of the same shape."""
    if report["command"] == "acceptance":
        return report["identical"] < 1
    if report["command"] == "exactness":
        for row in report["rows"]:
            if row["against"] == "fixed shape" and row["identical"] < 1:
                return True
    return False


if __name__ == "__main__":
    main()
