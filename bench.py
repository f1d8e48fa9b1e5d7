"""
Measures a drafter. Each command prints a table and, in its last line, a report in JSON. The report,
raw results and pictures go to out_dir.

    python bench.py acceptance                      # the shipped nano pair on held-out prompts
    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py acceptance --prompts=FILE.jsonl # lines with "question" and, if known, "answer"
    python bench.py acceptance --prompts=plain      # nano's arithmetic; or refusals
    python bench.py speedup                         # prompt by prompt, against the target alone
    python bench.py speedup --prompts=math500 --limit=64 --max_new_tokens=2048 --target=DIR \\
        --drafter=DIR
    python bench.py exactness --dtype=bfloat16      # is the output bitwise the target's own?
    python bench.py exactness --target=random:0.8b:4 --drafter=random --prompts=random:64:256
    python bench.py throughput                      # many sequences at once; what a tau is worth
    python bench.py speed --target=random:0.8b --drafter=random --prompts=random:64:256
    python bench.py speed --parts=training          # training steps
    python bench.py serve --base_url=http://localhost:30000/v1 \\
        --baseline_url=http://localhost:30001/v1 --concurrency=8
    python bench.py bugs                            # what each silent bug costs; --only=decoding
    python bench.py figures                         # pictures of the docs, from the logs

Each command is a file of that name in benchmarks/, and the file begins with what it measures.
--prompts=math500:FILE reads a copy of a public data set; FILE can also be a folder.
"""
import json
import os
import sys

import torch

from benchmarks import acceptance, bugs, exactness, figures, serve, speed, speedup, throughput
from checkpoint import write_whole
from configurator import configure, survive_closed_output

# what is measured
target = "data/nano/target"             # folder of the target, or random:0.8b and the like
drafter = "data/nano/drafter-dflash"    # folder of the drafter; random: an untrained one
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                         # compile the layers: a minute or two once, then faster
# on which prompts
prompts = "nano"                        # nano, plain, refusals, math500, gsm8k, humaneval,
                                        # FILE.jsonl, random:64:256
limit = 0                               # max number of prompts; 0: enough for about two minutes
max_new_tokens = 512                    # per answer
slots: tuple[int] = ()                  # sequences decoded at once; empty: 1, throughput 1 to 32
thinking = False                        # let a target that can think do so
# how tokens are chosen
temperature = 0.0                       # of the target's choice; 0 is greedy
top_k = 0                               # choose among this many likeliest tokens; 0: all
top_p = 1.0                             # nucleus sampling with this probability; 1: off
seed = 0                                # of the noise
draft_temperature = 0.0                 # above 0: guesses share the target's noise
# of single commands
temperatures: tuple[float] = (0.0, 0.7, 1.0)             # exactness: to compare at
parts: tuple[str] = ("decoding", "prefill", "kernel")    # speed: also training
recipe = "config/nano.py"               # speed: config file of its training steps
assumed_tau = 11.6                      # throughput: tokens per round
base_url = ""                           # serve: the server with a drafter, its address up to /v1
baseline_url = ""                       # serve: the server without a drafter
concurrency = 1                         # serve: requests at a time
only: tuple[str] = ()                   # bugs: decoding, training, or names; empty: all
# where the results go
out_dir = "out/bench"                   # pictures and raw results

COMMANDS = {
    "acceptance": acceptance.run,
    "speedup": speedup.run,
    "exactness": exactness.run,
    "throughput": throughput.run,
    "speed": speed.run,
    "serve": serve.run,
    "bugs": bugs.run,
    "figures": figures.run,
}


def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        configure(globals(), ["--help"])
    if command not in COMMANDS:
        sys.exit(f"bench.py: unknown command {command!r}: give one of {', '.join(COMMANDS)}, "
                 "then [config.py] [--key=value]. See --help")
    survive_closed_output()
    config = configure(globals(), words[1:])
    try:
        os.makedirs(config.out_dir, exist_ok=True)
        report, setup = COMMANDS[command](config)
    except ValueError as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written, because results are written at the end")
    path = os.path.join(config.out_dir, f"{command}.json")
    write_whole(path, json.dumps(report | {"setup": setup}) + "\n")
    print(json.dumps(report))
    if outputs_differ(report):
        sys.exit("error: an output differs from the target's own output with forwards of the same "
                 "shape: this is a bug, please report it")


def outputs_differ(report):
    """Whether an output differs from the target's own with forwards of the same shape."""
    if report["command"] == "acceptance":
        return report["identical"] < 1
    if report["command"] == "exactness":
        for row in report["rows"]:
            if row["against"] == "same shape" and row["identical"] < 1:
                return True
    return False


if __name__ == "__main__":
    main()
