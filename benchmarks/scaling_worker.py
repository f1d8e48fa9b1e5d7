"""
Measures runs of train.py, one after another in the same processes. benchmarks/scaling.py starts it:

    torchrun --standalone --nproc_per_node=2 -m benchmarks.scaling_worker JOB

JOB is a JSON file with the device, the path for the results, and a list of runs.
"""
import json
import os
import shutil
import sys

import torch

import train
from benchmarks.machine import device_name
from benchmarks.timing import clock
from checkpoint import write_whole
from configurator import configure
from data.synthetic import prepare
from training.checkpoints import save_checkpoint
from training.flops import mfu
from training.parallel import (gather_numbers, join_processes, leave_processes, rank, wait_for_all,
                               world_size)

WARM_UP_STEPS = 2  # at the beginning of a run; they do not count in its speed


def main():
    with open(sys.argv[1]) as f:
        job = json.load(f)
    join_processes(job["device"])
    results = {}
    for run in job["runs"]:
        _, results[run["name"]] = measure_run(run)
        torch._dynamo.reset()  # the next run may recompile as often as this one
    if rank() == 0:
        write_whole(job["results"], json.dumps(results) + "\n")
    leave_processes()


def make_samples(target, folder, flags, mixed=False):
    """Random samples for runs with these flags, of max_length tokens each or of mixed lengths."""
    max_length = configure(vars(train), flags).max_length
    prepare.main([f"--target={target}", f"--out_dir={folder}", f"--max_length={max_length}",
                  f"--length={0 if mixed else max_length}"])


def measure_run(job):
    """(run, result): the steps of train.py without its estimates, log, and decoding."""
    config = configure(vars(train), job["flags"])
    if rank() == 0:
        shutil.rmtree(config.out_dir, ignore_errors=True)
        os.makedirs(config.out_dir)
    wait_for_all()

    # compile every sample length and load every kernel before the first step
    run, _, _ = train.setup(config)
    run.total_steps = job["steps"]
    if config.device == "cuda":
        train.warm_up(run, train.micro_batch_loss)
        torch.cuda.reset_peak_memory_stats()

    steps = []
    while run.step < run.total_steps:
        began = clock()
        entry, sums = train.train_step(run)
        steps.append({
            "loss": entry["loss"],
            "grad_norm": entry["grad_norm"],
            "seconds": clock() - began,
            "tokens": sums.tokens.item(),
            "operations": sums.operations.item()})
        if run.step == job["save_at"]:
            save_checkpoint(run)
    setup = {"flags": job["flags"], "processes": world_size(), "dtype": config.dtype,
             "device": device_name(config.device), "torch": torch.__version__}
    return run, setup | speed_of(steps[WARM_UP_STEPS:], config) | {"steps": steps}


def speed_of(steps, config):
    """The speed of all processes together. Tokens include padding. Peak memory is per process."""
    seconds = sum(step["seconds"] for step in steps)
    operations = sum(step["operations"] for step in steps)
    samples_per_step = config.batch_size * config.grad_accum_steps * world_size()
    peak_gb = None
    if config.device == "cuda":
        peak_gb = gather_numbers(torch.cuda.max_memory_allocated() / 1e9, config.device)
    return {
        "samples_per_s": len(steps) * samples_per_step / seconds,
        "tokens_per_s": sum(step["tokens"] for step in steps) / seconds,
        "mfu": mfu(operations / seconds, config.device, config.dtype),
        "peak_gb": peak_gb}


if __name__ == "__main__":
    main()
