"""
Measures a drafter: python bench.py COMMAND [config.py] [--key=value]. The commands:
    acceptance  tau, the accepted positions of a block, and whether the outputs are the target's own
    speedup     the speed with a drafter, prompt by prompt, against the target alone
    exactness   are the outputs bitwise identical to the target's, for good and bad drafters?
    throughput  many sequences at once: tokens/s, and the tau from which speculation helps
    rollback    three ways to roll back rejected guesses: time, memory, and identical outputs
    speed       one forward, a round, and prefill, next to transformers
    scaling     samples/s of training with one process and with several (torchrun)
    serve       a running server with a drafter against the same server without one
    bugs        what each silent bug costs
    figures     draws the pictures of the docs again, from their logs
    page        records the rounds of one answer for docs/round.html
--prompts takes:
    nano, plain, refusals       held-out texts of the nano task
    math500, gsm8k, humaneval   public data sets from the Hub; math500:PATH reads a local copy
    FILE.jsonl                  rows with "question" and, if known, "answer"; or chats as for
                                training (messages, history, system, tools), cut before the last
                                answer
    random:N:LENGTH             random ids, from N to LENGTH tokens per prompt

    python bench.py acceptance --limit=20 --drafter=out/nano-dflash
    python bench.py speedup --prompts=math500 --target=DIR --drafter=DIR --max_new_tokens=2048
    python bench.py exactness --target=random:0.8b:4 --drafter=random --prompts=random:64:256

Each command is a file of that name in benchmarks/, and the file begins with what it measures. Its
last line is a report in JSON. out_dir gets the report with the settings, the commit, and the
machine, and also raw results and pictures.
"""
import importlib
import json
import os
import sys

import torch

from benchmarks.common import setup_of
from configurator import check_ranges, configure, survive_closed_output
from formats.files import one_line, write_whole
from sampling import SAMPLING_RANGES
from training.setup import check_out_dir

# what is measured
target = "data/nano/target"             # folder of the target, or random:0.8b and the like
drafter = "data/nano/drafter-dflash"    # folder of the drafter; random: an untrained one
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # of weights and activations
compile = False                         # compile the layers: a minute or two once, then faster
# on which prompts
prompts = "nano"                        # a name, FILE.jsonl, or random:N:LENGTH; see above
limit = 0                               # max number of prompts; 0: enough for about two minutes
max_new_tokens = 512                    # per answer
slots: tuple[int] = ()                  # sequences at once; empty: 1, throughput 1 to 32
thinking = False                        # let a target that can think do so
# how tokens are chosen
temperature = 0.0                       # of the target's choice; 0 is greedy
top_k = 0                               # choose among this many likeliest tokens; 0: all
top_p = 1.0                             # nucleus sampling with this probability; 1: off
seed = 0                                # of the noise
draft_temperature = 0.0                 # above 0: guesses share the target's noise
# of single commands
temperatures: tuple[float] = (0.0, 0.7, 1.0)             # exactness: to compare at
recipe = "config/nano.py"               # scaling: config file of the training steps
processes: tuple[int] = (1, 2)          # scaling: how many processes; all divide the largest
steps = 20                              # scaling: steps of a run; the first two are its warm-up
mixed = False                           # scaling: samples of mixed lengths
assumed_tau = 11.6                      # throughput: tokens per round
base_url = ""                           # serve: the server with a drafter, its address up to /v1
baseline_url = ""                       # serve: the server without a drafter
concurrency = 1                         # serve: requests at a time
only: tuple[str] = ()                   # bugs: decoding, training, or names; empty: all
# where the results go
out_dir = "out/bench"                   # pictures and raw results

RANGES = SAMPLING_RANGES | {
    "limit": (0, 10**9), "max_new_tokens": (1, 10**9), "slots": (1, 10**5),
    "temperatures": (0.0, 1e6), "processes": (1, 10**4), "steps": (3, 10**9),
    "assumed_tau": (1.0, 1e6), "concurrency": (1, 10**4)}

# the files in benchmarks/ with a function run(config), which returns the report
COMMANDS = ("acceptance", "speedup", "exactness", "throughput", "rollback", "speed", "scaling",
            "serve", "bugs", "figures", "page")


def main(argv=None):
    survive_closed_output()
    words = sys.argv[1:] if argv is None else argv
    command = words[0] if words else ""
    if command in ("-h", "--help"):
        configure(globals(), ["--help"])
    if command not in COMMANDS:
        sys.exit(f"bench.py: unknown command {command!r}: give one of {', '.join(COMMANDS)}, "
                 "then [config.py] [--key=value]. See --help")
    config = configure(globals(), words[1:])
    try:
        check_ranges(config, RANGES)
        for key in ("temperatures", "processes"):
            if not getattr(config, key):
                raise ValueError(f"{key} is empty: give at least one value")
        check_out_dir(config.out_dir)
        report = importlib.import_module(f"benchmarks.{command}").run(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error, 190)}")
    except KeyboardInterrupt:
        sys.exit("interrupted: nothing was written, because results are written at the end")
    report = {"command": command} | report
    path = os.path.join(config.out_dir, f"{command}.json")
    write_whole(path, json.dumps(report | {"setup": setup_of(config)}) + "\n")
    print(f"wrote {path}")
    print(json.dumps(report))
    if report.get("identical", 1) < 1:
        sys.exit("error: an output differs from the target's own output with forwards of the same "
                 "shape: this is a bug, please report it")


if __name__ == "__main__":
    main()
