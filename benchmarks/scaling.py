"""
Training with one process and with several: samples/s, memory, and whether the losses agree.

    python -m benchmarks.scaling                          # one GPU, then two with DDP and FSDP
    python -m benchmarks.scaling --processes=1,2,4,8 --train_args=config/phase1_2.py,--compile
    python -m benchmarks.scaling --device=cpu --train_args=config/nano.py \\
        --target=data/nano/target --steps=6

A mode is a number of processes with DDP or FSDP. All modes train on random samples
(data/synthetic), and a step has the same samples in every mode. The largest number of processes
runs train_args unchanged; fewer processes accumulate more micro-batches per step. Then several
processes resume from the checkpoint that one process wrote after half of the steps, and one process
resumes from each checkpoint of several processes.

benchmarks/scaling_worker.py measures the runs. This file starts it and compares the results.
"""
import json
import os
import subprocess
import sys
from typing import NamedTuple

import torch

import train
from benchmarks.scaling_worker import make_samples
from checkpoint import write_whole
from configurator import configure

train_args: tuple[str] = ("config/phase1_2.py",)  # config files and flags of train.py
target = "random:0.8b"              # the frozen target, whose weights may be random
processes: tuple[int] = (1, 2)      # numbers of processes; each divides the largest
mixed = False                       # samples of mixed lengths instead of max_length tokens each
steps = 50                          # steps of a run; the first two are its warm-up
out_dir = "out/bench/scaling"       # samples, runs, logs, and the report scaling.json
device = "cuda" if torch.cuda.is_available() else "cpu"  # cpu or cuda

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))


class Mode(NamedTuple):
    parallel: str       # ddp or fsdp, the key of train.py
    processes: int

    @property
    def name(self):
        if self.processes == 1:
            return "one"
        return f"{self.parallel}{self.processes}"


ONE = Mode("ddp", 1)  # a single process uses neither DDP nor FSDP


def main(argv=None):
    config = configure(globals(), argv)
    train_config = configure(vars(train), list(config.train_args))
    try:
        modes = all_modes(config)
        make_samples(
            config.target, f"{config.out_dir}/samples", list(config.train_args), config.mixed)
        results = {}
        for mode in modes:
            results |= launch(config, mode, [run_of(config, train_config, mode)])
        for mode in modes[1:]:
            results |= launch(config, mode, [run_of(config, train_config, mode, source=ONE)])
        resumed = [run_of(config, train_config, ONE, source=mode) for mode in modes[1:]]
        results |= launch(config, ONE, resumed)
    except ValueError as error:
        sys.exit(f"error: {error}")

    report = vars(config) | {
        "modes": mode_rows(modes, results),
        "resumed": resumed_rows(modes, results),
        "results": results}
    print_table(report["modes"])
    print_table(report["resumed"])
    write_whole(f"{config.out_dir}/scaling.json", json.dumps(report) + "\n")
    print(f"\nwrote {config.out_dir}/scaling.json")


def all_modes(config):
    """One process, then every larger number of processes with DDP and with FSDP."""
    if config.steps < 6:
        raise ValueError(f"steps = {config.steps}: use 6 or more: the speed of a resumed run "
                         "needs half of them and leaves out two")
    largest = max(config.processes)
    modes = [ONE]
    for count in config.processes:
        if count < 1 or largest < 2 or largest % count != 0:
            raise ValueError(f"processes = {config.processes}: all must divide the largest, "
                             "which must be at least 2")
        if count > 1:
            modes += [Mode("ddp", count), Mode("fsdp", count)]
    return modes


# --------------------------------------------------------------------------------------------------
# the runs


def run_of(config, train_config, mode, source=None):
    """A run in a mode, or the second half of the run of a `source`, as scaling_worker.py reads it.
    With fewer processes a step has more micro-batches, so all steps have the same samples."""
    name = run_name(mode, source)
    half = config.steps // 2
    times_more = max(config.processes) // mode.processes
    flags = [*config.train_args, f"--target={config.target}", f"--data={config.out_dir}/samples",
             f"--out_dir={config.out_dir}/{name}-dflash", f"--device={config.device}",
             f"--parallel={mode.parallel}",
             f"--grad_accum_steps={times_more * train_config.grad_accum_steps}"]
    if source is not None:
        flags.append(f"--resume_from={config.out_dir}/{source.name}-dflash/step-{half:06d}")
    return {"name": name, "flags": flags, "steps": config.steps, "save_at": half}


def run_name(mode, source):
    return mode.name if source is None else f"{source.name}-then-{mode.name}"


def launch(config, mode, runs):
    """Measure runs in new processes. Returns {name: result}; ValueError if a process fails."""
    path = os.path.abspath(f"{config.out_dir}/{runs[0]['name']}")
    job = {"device": config.device, "results": f"{path}.json", "runs": runs}
    write_whole(f"{path}.job", json.dumps(job))
    command = [sys.executable]
    if mode.processes > 1:
        command += ["-m", "torch.distributed.run", "--standalone",
                    f"--nproc_per_node={mode.processes}"]
    command += ["-m", "benchmarks.scaling_worker", f"{path}.job"]
    print(", ".join(run["name"] for run in runs), flush=True)
    # one thread per process, which is also torchrun's default
    environment = {"OMP_NUM_THREADS": "1"} | os.environ
    with open(f"{path}.log", "w") as f:
        process = subprocess.run(command, cwd=ROOT, env=environment, stdout=f, stderr=f)
    if process.returncode != 0:
        raise ValueError(f"{runs[0]['name']} failed: its output is in {path}.log")
    with open(f"{path}.json") as f:
        return json.load(f)


# --------------------------------------------------------------------------------------------------
# the report


def mode_rows(modes, results):
    """Speed, memory, and the largest relative difference from the losses of one process. scaling:
    the fraction of N times the speed of one process."""
    one = results["one"]
    rows = []
    for mode in modes:
        result = results[mode.name]
        rows.append({
            "mode": mode.name,
            "samples/s": result["samples_per_s"],
            "tokens/s": result["tokens_per_s"],
            "MFU": result["mfu"],
            "scaling": result["samples_per_s"] / (mode.processes * one["samples_per_s"]),
            "peak GB": result["peak_gb"],
            "last loss": result["steps"][-1]["loss"],
            "loss difference": largest_difference(result["steps"], one["steps"], "loss"),
            "norm difference": largest_difference(result["steps"], one["steps"], "grad_norm")})
    return rows


def resumed_rows(modes, results):
    """Resumed runs, compared with the end of the run whose checkpoint they resumed from."""
    rows = []
    for several in modes[1:]:
        for source, mode in ((ONE, several), (several, ONE)):
            name = run_name(mode, source)
            steps = results[name]["steps"]
            source_steps = results[source.name]["steps"][-len(steps):]
            rows.append({
                "resumed": name,
                "loss difference": largest_difference(steps, source_steps, "loss"),
                "norm difference": largest_difference(steps, source_steps, "grad_norm")})
    return rows


def largest_difference(steps, other_steps, key):
    """The largest |a - b| / |b| over two lists of equally many steps."""
    differences = []
    for own, other in zip(steps, other_steps, strict=True):
        differences.append(abs(own[key] - other[key]) / abs(other[key]))
    return max(differences)


def print_table(rows):
    """Rows as a Markdown table."""
    print(f"\n| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        cells = []
        for value in row.values():
            cells.append(f"{value:.4g}" if isinstance(value, float) else str(value))
        print(f"| {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
