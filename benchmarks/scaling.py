"""
Training with 1 to N processes: samples/s, memory, and whether the losses agree.

    python bench.py scaling --target=random:0.8b --recipe=config/phase1_2.py --processes=1,2,4,8

Each row is a short run of train.py, under torchrun if it has several processes. The figures come
from its log.jsonl. All runs train on the same random samples (data/synthetic), and their steps have
the same samples: the largest number of processes runs the recipe unchanged, and fewer processes
accumulate more micro-batches per step.
"""
import json
import os
import subprocess
import sys
import tempfile

import train
from benchmarks.common import print_table
from configurator import configure
from data.synthetic import prepare
from formats.files import whole_file

COLUMNS = ("parallel", "processes", "samples_per_s", "tokens_per_s", "mfu", "scaling", "peak_gb",
           "loss_difference", "grad_norm_difference")
WARM_UP_STEPS = 2  # at the beginning of a run; they do not count in its speed


def run(config):
    largest = max(config.processes)
    modes = [("ddp", 1)]  # (key `parallel` of train.py, processes)
    for processes in config.processes:
        if largest % processes != 0:
            raise ValueError(f"processes = {config.processes}: all must divide the largest")
        if processes > 1:
            modes += [("ddp", processes), ("fsdp", processes)]
    samples = f"{config.out_dir}/samples"
    flags = [config.recipe, f"--target={config.target}", f"--data={samples}", "--epochs=1",
             f"--device={config.device}", f"--dtype={config.dtype}", f"--compile={config.compile}",
             "--log_every=1", "--eval_every=0", "--save_every=0", "--decode_prompts=0"]
    settings = configure(vars(train), flags)
    samples_per_step = settings.batch_size * settings.grad_accum_steps * largest
    length = 0 if config.mixed else settings.max_length
    prepare.main([f"--target={config.target}", f"--out_dir={samples}", f"--length={length}",
                  f"--max_length={settings.max_length}",
                  f"--rows={config.steps * samples_per_step}"])
    rows = []
    for parallel, processes in modes:
        accumulation = settings.grad_accum_steps * largest // processes
        log = train_in_processes(config, f"{parallel}{processes}", processes, [
            *flags, f"--parallel={parallel}", f"--grad_accum_steps={accumulation}"])
        rows.append({"parallel": parallel, "processes": processes, "log": log})
        add_speed(rows[-1], samples_per_step)
        compare(rows[-1], rows[0])
        print_table(rows[-1:], COLUMNS, header=len(rows) == 1)
    return {"rows": rows}


def train_in_processes(config, name, processes, flags):
    """The entries in the log of a run of train.py."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    # one thread per process, which is also torchrun's default
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    printed = f"{config.out_dir}/{name}.log"
    with tempfile.TemporaryDirectory(dir=config.out_dir) as folder:  # for its checkpoint
        command = [*launcher, train.__file__, *flags, f"--out_dir={folder}"]
        with whole_file(printed) as f:
            process = subprocess.run(command, env=environment, stdout=f, stderr=f)
        if process.returncode != 0:
            raise ValueError(f"training with {processes} processes failed: see {printed}")
        with open(os.path.join(folder, "log.jsonl")) as f:
            return [json.loads(line) for line in f]


def add_speed(row, samples_per_step):
    """Add the speed of all processes together after the warm-up. Tokens include padding.

    The rates in a log are means since the first step.
    """
    first = row["log"][WARM_UP_STEPS - 1]
    last = row["log"][-1]
    seconds = last["seconds"] - first["seconds"]
    row["samples_per_s"] = samples_per_step * (last["step"] - first["step"]) / seconds
    for rate in ("tokens_per_s", "mfu"):
        row[rate] = None  # the peak of a CPU is not known
        if last[rate] is not None:
            before = first[rate] * first["seconds"]
            row[rate] = (last[rate] * last["seconds"] - before) / seconds
    row["peak_gb"] = last["peak_gb"]


def compare(row, one):
    """Add the fraction of N times the speed of one process, and the largest relative differences
    from its steps."""
    row["scaling"] = row["samples_per_s"] / (row["processes"] * one["samples_per_s"])
    for key in ("loss", "grad_norm"):
        differences = []
        for own, other in zip(row["log"], one["log"], strict=True):
            differences.append(abs(own[key] - other[key]) / abs(other[key]))
        row[f"{key}_difference"] = max(differences)
