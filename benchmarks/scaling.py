"""
One GPU against two, at Phase 1.2's shape with random weights and random rows: speed and memory of
DDP and FSDP, whether their losses are the same, what a resumed run is like after a change of GPUs,
larger targets, and what happens when a process is killed.

    python -m benchmarks.scaling                        # all groups of arms, about 18 minutes
    python -m benchmarks.scaling --only=full-eager,kill # some of them
    python -m benchmarks.scaling --device=cpu --recipe=config/nano.py --target=data/nano/target \\
        --only=full-eager,float32,bfloat16,kill --steps=4 --loss_steps=6    # two CPU processes

An arm is one run. Its result is a file in out_dir; an arm that has one is not run again, so an
interrupted command goes on where it was. Arms with as many processes run one after another in the
same processes (benchmarks/training_arms.py), as starting them takes longer than their steps.
"""
import glob
import json
import os
import re
import shutil
import subprocess
import sys
import time
from typing import NamedTuple

import torch
from torch.utils._pytree import tree_leaves

import train
from benchmarks.machine import print_row
from checkpoint import newest_checkpoint, write_whole
from configurator import configure
from data.synthetic import prepare
from training.checkpoints import read_state_file

recipe = "config/phase1_2.py"   # config file of the runs
target = "random:0.8b"          # of all runs but those of larger targets
only: tuple[str] = ()           # groups of arms to run, see GROUPS; empty: all; report: none
steps = 12                      # of a run whose speed is measured, on two GPUs; twice on one
loss_steps = 50                 # of a run whose losses are compared
out_dir = "out/bench/scaling"   # results, a file an arm, and scaling.json, the report
work_dir = "out/scaling"        # rows, checkpoints and logs of the runs
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
GROUPS = ("full-eager", "full-compile", "float32", "bfloat16", "resume", "4b", "9b", "mixed-eager",
          "mixed-compile", "kill")
PROCESSES = {"one": 1, "ddp": 2, "fsdp": 2}  # of the ways to run


class Arm(NamedTuple):
    """A run of train.py. The way is one, ddp or fsdp; of a resumed run two of them."""
    group: str
    way: str
    flags: list
    steps: int
    warm_up_steps: int = 2
    save_at: tuple = ()
    resume_from: str | None = None
    turn: int = 0           # arms of a later turn need checkpoints of earlier ones

    @property
    def name(self):
        return f"{self.group}-{self.way}"

    @property
    def processes(self):
        return PROCESSES[self.way.split("-then-")[-1]]


def main(argv=None):
    config = configure(globals(), argv)
    for group in config.only:
        if group not in (*GROUPS, "report"):
            sys.exit(f"error: only = {config.only}: {group!r} is none of {', '.join(GROUPS)}")
    os.makedirs(config.out_dir, exist_ok=True)
    os.makedirs(config.work_dir, exist_ok=True)
    shape = configure(vars(train), [config.recipe])
    arms = all_arms(config, shape)
    if config.only != ("report",):
        chosen = config.only or GROUPS
        make_rows(config, shape)
        run_arms(config, [arm for arm in arms if arm.group in chosen])
        if "kill" in chosen and result_of(config, "kill") is None:
            kill_a_process(config, shape)
    report(config, arms)


# ------------------------------------------------------------------------------------------------
# the arms


def all_arms(config, shape):
    """Every Arm. shape: the settings of the recipe."""
    arms = speed_arms(config, shape, "full", "eager")
    arms += speed_arms(config, shape, "full", "compile")
    arms += loss_arms(config, shape)
    arms += resumed_arms(config, shape)
    arms += larger_targets(config, shape)
    arms += speed_arms(config, shape, "mixed", "eager")
    arms += speed_arms(config, shape, "mixed", "compile")
    return arms


def speed_arms(config, shape, rows, mode):
    """The command of the recipe, as it is: two GPUs make steps of twice as many samples, and half
    as many steps see the same samples."""
    arms = []
    for way, processes in PROCESSES.items():
        flags = flags_of(config, shape, way, rows)
        if mode == "compile":
            flags.append("--compile")
        share = 2 // processes
        arms.append(Arm(f"{rows}-{mode}", way, flags, config.steps * share, 2 * share))
    return arms


def loss_arms(config, shape):
    """The same samples in each step, whatever the number of GPUs, in both dtypes. In float32 rows
    are half as long and anchors an eighth as many, or it would take minutes."""
    length = shape.max_length // 2
    short = ["--dtype=float32", f"--max_length={length}", f"--pad_to_multiple_of={length}",
             f"--num_anchors={shape.num_anchors // 8}"]
    saves = (config.loss_steps - 10, config.loss_steps)
    arms = []
    for way in PROCESSES:
        flags = flags_of(config, shape, way, "full") + [same_batch(way)]
        arms.append(Arm("float32", way, flags + short, config.loss_steps))
        flags = flags + ["--dtype=bfloat16"]
        arms.append(Arm("bfloat16", way, flags, config.loss_steps, save_at=saves))
    return arms


def resumed_arms(config, shape):
    """The last ten steps of the bfloat16 runs, from the checkpoints of other ways to run."""
    arms = []
    for source, way in (("ddp", "ddp"), ("fsdp", "fsdp"), ("one", "ddp"), ("ddp", "one"),
                        ("fsdp", "one")):
        flags = flags_of(config, shape, way, "full")
        flags += [same_batch(way), "--dtype=bfloat16", "--resume"]
        step = f"step-{config.loss_steps - 10:06d}"
        folder = os.path.join(run_dir(config, f"bfloat16-{source}"), step)
        turn = 2 // PROCESSES[way] - 1  # those on one GPU wait for their sources on two
        arms.append(Arm("resume", f"{source}-then-{way}", flags, config.loss_steps,
                        save_at=(config.loss_steps,), resume_from=folder, turn=turn))
    return arms


def larger_targets(config, shape):
    """A few steps of drafters for 4B- and 9B-shaped targets."""
    arms = []
    for size, more in (("4b", []), ("9b", ["--intermediate_size=12288"])):
        for way in ("fsdp", "ddp"):
            flags = flags_of(config, shape, way, "full")
            flags += ["config/qwen3_5_4b.py", f"--target=random:{size}", *more]
            arms.append(Arm(size, way, flags, steps=5))
    return arms


def flags_of(config, shape, way, rows):
    """The flags of train.py that all arms share."""
    flags = [config.recipe, f"--target={config.target}", f"--device={config.device}",
             f"--data={os.path.join(config.work_dir, rows)}", "--log_every=1"]
    if rows == "full":
        flags.append(f"--pad_to_multiple_of={shape.max_length}")  # one length to compile
    if way == "fsdp":
        flags.append("--parallel=fsdp")
    return flags


def same_batch(way):
    """Two micro-batches a step, of one process or of two."""
    return f"--grad_accum_steps={2 // PROCESSES[way]}"


def run_dir(config, name):
    return os.path.join(config.work_dir, f"{name}-dflash")


def make_rows(config, shape):
    """Rows of the longest length, and of mixed lengths."""
    for rows, length in (("full", shape.max_length), ("mixed", 0)):
        folder = os.path.join(config.work_dir, rows)
        if os.path.exists(os.path.join(folder, "meta.json")):
            continue
        prepare.main([
            f"--target={config.target}", f"--out_dir={folder}", f"--length={length}",
            f"--max_length={shape.max_length}"])


# ------------------------------------------------------------------------------------------------
# running them


def result_of(config, name):
    """The result of an arm, or None if it has none yet or has failed."""
    path = os.path.join(config.out_dir, f"{name}.json")
    if not os.path.exists(path):
        return None
    with open(path) as f:
        result = json.load(f)
    if "error" in result:
        return None
    return result


def run_arms(config, arms):
    """Run those without a result, turn by turn, those on one GPU first."""
    sessions = {}
    for arm in arms:
        if result_of(config, arm.name) is None:
            sessions.setdefault((arm.turn, arm.processes), []).append(arm)
    for turn, processes in sorted(sessions):
        missing = sessions[turn, processes]
        while missing:
            log = start(config, missing, processes)
            unmeasured = [arm for arm in missing if result_of(config, arm.name) is None]
            if unmeasured:
                # the first of them is the one that failed; the others have not been tried
                write_result(config, unmeasured[0].name, {"error": first_error(log)})
                print_row(unmeasured[0].name, f"failed: {first_error(log)}")
            missing = unmeasured[1:]
    for arm in arms:
        if arm.resume_from is not None:
            compare_with_source(config, arm)


def start(config, arms, processes):
    """Run arms in so many processes; returns the path of what they printed."""
    job = {"device": config.device, "results": config.out_dir, "arms": []}
    for arm in arms:
        flags = [*arm.flags, f"--out_dir={run_dir(config, arm.name)}"]
        job["arms"].append(arm._asdict() | {"name": arm.name, "flags": flags})
    path = os.path.join(config.work_dir, f"job-{arms[0].name}.json")
    write_whole(path, json.dumps(job))
    log = path.replace(".json", ".log")
    began = time.time()
    with open(log, "w") as f:
        command = launcher(processes) + ["-m", "benchmarks.training_arms", path]
        subprocess.run(command, cwd=ROOT, env=environment(), stdout=f, stderr=f)
    print_row(f"{processes} processes", f"{', '.join(arm.name for arm in arms)}: "
              f"{time.time() - began:.0f} s")
    sys.stdout.flush()
    return log


def launcher(processes):
    if processes == 1:
        return [sys.executable]
    return [sys.executable, "-m", "torch.distributed.run", "--standalone",
            f"--nproc_per_node={processes}"]


def environment():
    """One thread a process, which is what torchrun chooses where nothing is set."""
    return {"OMP_NUM_THREADS": "1"} | os.environ


def first_error(log):
    """The first line of a log that names an error."""
    with open(log, errors="replace") as f:
        for line in f:
            if re.search(r"(Error|error): ", line):
                return line.strip()[:500]
    return f"no line of {log} names an error"


def write_result(config, name, result):
    write_whole(os.path.join(config.out_dir, f"{name}.json"), json.dumps(result) + "\n")


# ------------------------------------------------------------------------------------------------
# a process is killed


def kill_a_process(config, shape):
    """Start train.py as a user does, kill -9 process 1 of two after some steps, and write down when
    all have ended, with which status, what stands on the screen and what is left on disk."""
    folder = run_dir(config, "kill")
    shutil.rmtree(folder, ignore_errors=True)
    flags = flags_of(config, shape, "ddp", "full") + [f"--out_dir={folder}", "--save_every=3"]
    command = launcher(2) + ["train.py", *flags]
    log = os.path.join(config.work_dir, "kill.log")
    with open(log, "w") as f:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment(), stdout=subprocess.DEVNULL, stderr=f)
    while process.poll() is None and last_step(folder) < 5:
        time.sleep(0.1)
    if process.poll() is not None:
        write_result(config, "kill", {"error": first_error(log)})
        return
    began = time.time()
    os.kill(child_of_rank(process.pid, 1), 9)
    process.wait()
    with open(log, errors="replace") as f:
        screen = f.read()
    write_result(config, "kill", {
        "name": "kill", "command": ["torchrun", *command[3:]], "seconds": time.time() - began,
        "status": process.returncode, "last_step": last_step(folder),
        "checkpoint": os.path.basename(newest_checkpoint(folder)), "screen": screen})


def last_step(folder):
    """The last step in the log of a run; 0 if it has none."""
    path = os.path.join(folder, "log.jsonl")
    if not os.path.exists(path):
        return 0
    with open(path) as f:
        lines = f.readlines()
    if not lines or not lines[-1].endswith("\n"):
        return 0
    return json.loads(lines[-1])["step"]


def child_of_rank(parent, number):
    """The id of the process that torchrun, of id `parent`, started with that RANK. On Linux."""
    for folder in glob.glob("/proc/[0-9]*"):
        try:
            with open(f"{folder}/stat") as f:
                after_name = f.read().rpartition(")")[2].split()
            with open(f"{folder}/environ") as f:
                environment = f.read().split("\0")
        except OSError:  # it has ended, or is not ours
            continue
        if int(after_name[1]) == parent and f"RANK={number}" in environment:
            return int(os.path.basename(folder))
    raise ValueError(f"process {parent} has no child of rank {number}")


# ------------------------------------------------------------------------------------------------
# the report


def report(config, arms):
    """Print tables, in markdown, of all results in out_dir, and write scaling.json."""
    results = {}
    for name in [*[arm.name for arm in arms], "kill"]:
        result = result_of(config, name)
        if result is not None:
            results[name] = result
    measured = [arm for arm in arms if arm.name in results]
    tables = {
        "speed": speed_rows(measured, results),
        "losses": loss_rows(measured, results),
        "resumed": resumed_rows(measured, results)}
    for name, rows in tables.items():
        print_markdown(name, rows)
    if "kill" in results:
        kill = results["kill"]
        print(f"\nkilled: all ended after {kill['seconds']:.1f} s with status {kill['status']}, "
              f"{len(kill['screen'].splitlines())} lines on stderr, {kill['checkpoint']} is left")
    report = {"recipe": config.recipe, "target": config.target, **tables, "results": results}
    write_whole(os.path.join(config.out_dir, "scaling.json"), json.dumps(report) + "\n")


def speed_rows(arms, results):
    """Speed and memory of every arm that was not resumed. scaling: the share of twice the speed of
    one GPU in the same group."""
    rows = []
    for arm in arms:
        if arm.group == "resume":
            continue
        result = results[arm.name]
        one = results.get(f"{arm.group}-one")
        row = {"group": arm.group, "way": arm.way, "samples/s": result["samples_per_s"],
               "tokens/s": result["tokens_per_s"], "ms a step": 1e3 * result["step_s"],
               "MFU": result["mfu"], "scaling": None, "GB": result["peak_gb"],
               "GB at the start": result["setup_peak_gb"], "ready after s": result["warm_up_s"]}
        if one is not None and arm.processes == 2:
            row["scaling"] = result["samples_per_s"] / (2 * one["samples_per_s"])
        for part in ("compute", "exchange", "exposed", "idle"):
            row[f"{part} ms"] = None
            if "gpu_time" in result:
                row[f"{part} ms"] = [1e3 * value for value in result["gpu_time"][part]]
        rows.append(row)
    return rows


def loss_rows(arms, results):
    """How far losses and norms are from those of one GPU, at most, as a share."""
    rows = []
    for arm in arms:
        one = results.get(f"{arm.group}-one")
        if arm.group not in ("float32", "bfloat16") or arm.way == "one" or one is None:
            continue
        own_steps = results[arm.name]["steps"]
        rows.append({
            "dtype": arm.group, "way": arm.way, "steps": len(own_steps),
            "first loss": own_steps[0]["loss"], "last loss": own_steps[-1]["loss"],
            "loss apart": largest_difference(own_steps, one["steps"], "loss"),
            "norm apart": largest_difference(own_steps, one["steps"], "grad_norm")})
    return rows


def largest_difference(steps, other_steps, key):
    differences = []
    for own, other in zip(steps, other_steps, strict=True):
        differences.append(abs(own[key] - other[key]) / abs(other[key]))
    return max(differences)


def compare_with_source(config, arm):
    """Add to the result of a resumed run how far it is from the uninterrupted run of its source."""
    result = result_of(config, arm.name)
    source = os.path.dirname(arm.resume_from)
    step = f"step-{config.loss_steps:06d}"
    is_compared = result is None or "same_bits" in result
    if is_compared or not os.path.isdir(os.path.join(source, step)):
        return
    state = read_state_file(os.path.join(run_dir(config, arm.name), step))
    source_state = read_state_file(os.path.join(source, step))
    source_name = os.path.basename(source).removesuffix("-dflash")
    steps = result["steps"]
    source_steps = result_of(config, source_name)["steps"][-len(steps):]
    result |= {
        "same_bits": same_bits(state, source_state),
        "weights_apart": distance(state, source_state),
        "loss_apart": largest_difference(steps, source_steps, "loss")}
    write_result(config, arm.name, result)


def resumed_rows(arms, results):
    """What compare_with_source found."""
    rows = []
    for arm in arms:
        result = results[arm.name]
        if "same_bits" in result:
            rows.append({
                "resumed": arm.way, "same bits": result["same_bits"],
                "weights apart": result["weights_apart"], "loss apart": result["loss_apart"]})
    return rows


def same_bits(state, other):
    """Whether weights and moments of two checkpoints are equal to the bit."""
    for part in ("master_weights", "optimizer_state_dict"):
        pairs = zip(tree_leaves(state[part]), tree_leaves(other[part]), strict=True)
        for a, b in pairs:
            if isinstance(a, torch.Tensor) and not torch.equal(a, b):
                return False
    return True


def distance(state, other):
    """|a - b| / |b| over all weights of two checkpoints."""
    squared_difference = 0.0
    squared_norm = 0.0
    for name, weight in other["master_weights"].items():
        difference = state["master_weights"][name].double() - weight.double()
        squared_difference += difference.square().sum().item()
        squared_norm += weight.double().square().sum().item()
    return (squared_difference / squared_norm) ** 0.5


def print_markdown(title, rows):
    if not rows:
        return
    print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(as_text(value) for value in row.values())} |")


def as_text(value):
    if value is None:
        return ""
    if isinstance(value, list):
        return ", ".join(as_text(number) for number in value)
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


if __name__ == "__main__":
    main()
