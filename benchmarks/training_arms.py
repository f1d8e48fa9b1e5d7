"""
Measures runs of train.py, one after another in the same processes: seconds, memory and losses of
their steps, and where the time of a step goes on each GPU. benchmarks/scaling.py starts it:

    python -m benchmarks.training_arms JOB.json
    torchrun --standalone --nproc_per_node=2 -m benchmarks.training_arms JOB.json

A job names the device, a folder for results, and arms, which are dicts with

    name            of the result's file
    flags           of train.py, config files among them
    steps           of the run; its learning rate falls to zero over them
    warm_up_steps   at its beginning that no speed is taken of
    save_at         steps after which a checkpoint is written
    resume_from     folder of a checkpoint to go on from, or None
"""
import gc
import json
import os
import shutil
import sys
from statistics import median

import torch

import train
from benchmarks.machine import device_name
from benchmarks.timing import clock
from checkpoint import write_whole
from configurator import configure
from training.flops import mfu
from training.parallel import (gather_numbers, join_processes, leave_processes, rank, wait_for_all,
                      world_size)
from training.checkpoints import save_checkpoint


def main():
    with open(sys.argv[1]) as f:
        job = json.load(f)
    join_processes(job["device"])
    for arm in job["arms"]:
        run, result = measure(arm)
        write_result(job, arm, result)
        if run.config.device == "cuda":
            result["gpu_time"] = gpu_time_of_a_step(run)
            write_result(job, arm, result)
        # the next arm wants the memory, and limits of compilation that nobody has used up
        del run
        gc.collect()
        torch._dynamo.reset()
        if job["device"] == "cuda":
            torch.cuda.empty_cache()
    leave_processes()


def write_result(job, arm, result):
    if rank() == 0:
        path = os.path.join(job["results"], f"{arm['name']}.json")
        write_whole(path, json.dumps(result) + "\n")


def measure(arm):
    """(run, result) of an arm: what train.py does, without estimates, log and decoding."""
    config = configure(vars(train), arm["flags"])
    if rank() == 0:
        prepare_out_dir(config, arm)
    wait_for_all()

    # set up; then compile every length of rows and load every kernel
    begin = clock()
    run, _, _ = train.setup(config)
    run.total_steps = arm["steps"]
    train.warm_up(run)
    warm_up_seconds = clock() - begin
    peak_of_setup = peak_gigabytes(config.device)
    if config.device == "cuda":
        torch.cuda.reset_peak_memory_stats()

    steps = []
    while run.step < run.total_steps:
        begin = clock()
        entry, sums = train.train_step(run)
        steps.append({
            "loss": entry["loss"], "grad_norm": entry["grad_norm"], "seconds": clock() - begin,
            "tokens": sums.tokens.item(), "operations": sums.operations.item()})
        if run.step in arm["save_at"]:
            save_checkpoint(run)
    result = {
        "name": arm["name"], "flags": arm["flags"], "processes": world_size(),
        "device": device_name(config.device), "torch": torch.__version__, "dtype": config.dtype,
        "warm_up_s": warm_up_seconds, "setup_peak_gb": peak_of_setup,
        "peak_gb": peak_gigabytes(config.device)}
    result |= speed_of(steps[arm["warm_up_steps"]:], config)
    return run, result | {"steps": steps}


def prepare_out_dir(config, arm):
    """Empty out_dir, but for the checkpoint that the arm goes on from."""
    shutil.rmtree(config.out_dir, ignore_errors=True)
    source = arm["resume_from"]
    if source is not None:
        shutil.copytree(source, os.path.join(config.out_dir, os.path.basename(source)))


def peak_gigabytes(device):
    """Gigabytes that tensors took at most, by process; None on CPUs."""
    if device != "cuda":
        return None
    return gather_numbers(torch.cuda.max_memory_allocated() / 1e9, device)


def speed_of(steps, config):
    """Of all processes together. Tokens count with their padding."""
    seconds = sum(step["seconds"] for step in steps)
    samples = len(steps) * config.batch_size * config.grad_accum_steps * world_size()
    operations = sum(step["operations"] for step in steps)
    return {
        "samples_per_s": samples / seconds,
        "tokens_per_s": sum(step["tokens"] for step in steps) / seconds,
        "mfu": mfu(operations / seconds, config.device, config.dtype),
        "step_s": median(step["seconds"] for step in steps)}


# ------------------------------------------------------------------------------------------------
# where the time goes


def gpu_time_of_a_step(run):
    """Seconds of one more step on each GPU, lists by process.

    From the first kernel to the last: "compute", at least one kernel that computes; "exposed", only
    kernels of NCCL, which also run while they wait for another GPU; "idle", none. "exchange" is all
    time with kernels of NCCL, most of it beside others where the exchange is hidden.
    """
    path = os.path.join(run.config.out_dir, f"trace-{rank()}.json")
    os.makedirs(run.config.out_dir, exist_ok=True)
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profiler:
        train.train_step(run)
        torch.cuda.synchronize()
    profiler.export_chrome_trace(path)
    with open(path) as f:
        events = json.load(f)["traceEvents"]
    os.remove(path)
    seconds = {}
    for name, value in split_time(events).items():
        seconds[name] = gather_numbers(value, run.config.device)
    return seconds


def split_time(events):
    """The seconds of gpu_time_of_a_step, from the events of a chrome trace, in microseconds."""
    compute = []
    exchange = []
    for event in events:
        if event.get("cat") not in ("kernel", "gpu_memcpy", "gpu_memset"):
            continue
        span = (event["ts"], event["ts"] + event["dur"])
        if event["name"].startswith("nccl"):
            exchange.append(span)
        else:
            compute.append(span)
    spans = compute + exchange
    first = min(begin for begin, _ in spans)
    last = max(end for _, end in spans)
    busy = covered(spans)
    computing = covered(compute)
    microseconds = {
        "step": last - first, "compute": computing, "exchange": covered(exchange),
        "exposed": busy - computing, "idle": last - first - busy}
    return {name: value / 1e6 for name, value in microseconds.items()}


def covered(spans):
    """The time that spans (begin, end) cover together; what overlaps counts once."""
    total = 0
    covered_until = -float("inf")
    for begin, end in sorted(spans):
        if end > covered_until:
            total += end - max(begin, covered_until)
            covered_until = end
    return total


if __name__ == "__main__":
    main()
