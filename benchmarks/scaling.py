"""
Training with one process and with several: samples/s, memory, and whether the losses agree.

A mode is a number of processes with DDP or FSDP. All modes train on random samples
(data/synthetic), and a step has the same samples in every mode. The largest number of processes
runs the recipe unchanged; fewer processes accumulate more micro-batches per step. torchrun starts
this file again as a script, whose processes measure the real step of train.py.
"""
import json
import os
import subprocess
import sys

import torch

import train
from benchmarks.common import print_table, setup_of
from benchmarks.timing import clock
from configurator import configure
from data.synthetic import prepare
from formats.files import read_json, whole_file, write_whole
from training.flops import mfu
from training.parallel import (join_processes, leave_processes, peak_memory, rank, wait_for_all,
                               world_size)

COLUMNS = ("parallel", "processes", "samples_per_s", "tokens_per_s", "mfu", "scaling", "peak_gb",
           "loss_difference", "grad_norm_difference")
WARM_UP_STEPS = 2  # at the beginning of a run; they do not count in its speed
ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


def run(config):
    modes = all_modes(config)
    train_config = prepare_training(config)
    rows = []
    for parallel, processes in modes:
        row = launch(config, train_config.grad_accum_steps, parallel, processes)
        rows.append(row)
        compare(row, rows[0])
        print_table([row], COLUMNS, header=len(rows) == 1)
    return {"command": "scaling", "rows": rows}, setup_of(config)


def all_modes(config):
    """[(key `parallel` of train.py, number of processes)]. A single process uses neither."""
    largest = max(config.processes)
    modes = [("ddp", 1)]
    for count in config.processes:
        if largest % count != 0:
            raise ValueError(f"processes = {config.processes}: all must divide the largest")
        if count > 1:
            modes += [("ddp", count), ("fsdp", count)]
    return modes


def compare(row, one):
    """Add the fraction of N times the speed of one process, and the largest relative differences
    from its steps."""
    row["scaling"] = row["samples_per_s"] / (row["processes"] * one["samples_per_s"])
    for key in ("loss", "grad_norm"):
        differences = []
        for own, other in zip(row["steps"], one["steps"], strict=True):
            differences.append(abs(own[key] - other[key]) / abs(other[key]))
        row[f"{key}_difference"] = max(differences)


def prepare_training(config):
    """Write random samples for the recipe, of max_length tokens each or of mixed lengths. Returns
    the configuration of train.py."""
    train_config = configure(vars(train), train_flags(config))
    length = 0 if config.mixed else train_config.max_length
    prepare.main([f"--target={config.target}", f"--out_dir={config.out_dir}/samples",
                  f"--max_length={train_config.max_length}", f"--length={length}"])
    return train_config


def train_flags(config):
    """Flags of train.py for the recipe on these samples."""
    return [config.recipe, f"--target={config.target}", f"--device={config.device}",
            f"--dtype={config.dtype}", f"--compile={config.compile}",
            f"--data={config.out_dir}/samples", f"--out_dir={config.out_dir}/training-dflash"]


def launch(config, grad_accum_steps, parallel, processes):
    """Train in new processes. Returns their result. With fewer processes there are
    more micro-batches per step, so that a step has the same samples."""
    times_more = max(config.processes) // processes
    flags = [*train_flags(config), f"--parallel={parallel}",
             f"--grad_accum_steps={times_more * grad_accum_steps}"]
    path = os.path.abspath(f"{config.out_dir}/{parallel}{processes}")
    command = [sys.executable]
    if processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command += ["-m", "benchmarks.scaling", f"{path}.json", str(config.steps), *flags]
    # one thread per process, which is also torchrun's default
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with whole_file(f"{path}.log") as f:
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=f, stderr=f)
    if process.returncode != 0:
        raise ValueError(f"training with {processes} processes failed: see {path}.log")
    return read_json(f"{path}.json")


# --------------------------------------------------------------------------------------------------
# in each process


def main():
    """torchrun .. -m benchmarks.scaling RESULT STEPS FLAGS"""
    path, steps, *flags = sys.argv[1:]
    config = configure(vars(train), flags)
    join_processes(config.device)
    _, result = measure_steps(config, int(steps))
    if rank() == 0:
        write_whole(path, json.dumps(result) + "\n")
    leave_processes()


def measure_steps(config, count):
    """(run, result): steps of train.py without its estimates, log, checkpoints, and decoding. The
    speed is the sum over all processes. Tokens include padding. Peak memory is per process."""
    # compile every sample length and load every kernel before the first step
    training_run, _, _ = train.setup(config)
    training_run.total_steps = count
    if config.device == "cuda":
        train.warm_up(training_run, train.micro_batch_loss)
        torch.cuda.reset_peak_memory_stats()
    wait_for_all()

    steps = []
    for _ in range(count):
        began = clock()
        entry, sums = train.train_step(training_run)
        steps.append({"loss": entry["loss"], "grad_norm": entry["grad_norm"],
                      "seconds": clock() - began, "tokens": sums.tokens.item(),
                      "operations": sums.operations.item()})
    timed = steps[WARM_UP_STEPS:]
    seconds = sum(step["seconds"] for step in timed)
    operations = sum(step["operations"] for step in timed)
    samples_per_step = config.batch_size * config.grad_accum_steps * world_size()
    return training_run, {
        "parallel": config.parallel, "processes": world_size(),
        "seconds": seconds / len(timed), "samples_per_s": len(timed) * samples_per_step / seconds,
        "tokens_per_s": sum(step["tokens"] for step in timed) / seconds,
        "mfu": mfu(operations / seconds, config.device, config.dtype),
        "peak_gb": peak_memory(config.device), "steps": steps}


if __name__ == "__main__":
    main()
