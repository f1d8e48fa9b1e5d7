"""One GPU against two: arms that are not the same work, times that count twice, rows and targets
that train.py does not take, a lost process that nobody names."""
import os
import socket
import subprocess
import sys

import pytest

import checkpoint
import train
from benchmarks import scaling, training_arms
from configurator import configure
from data.samples import Samples
from data.synthetic import prepare
from tests.common import ROOT, read_jsonl, small_config, write_config


@pytest.fixture
def config(monkeypatch):
    monkeypatch.chdir(ROOT)
    return configure(vars(scaling), [])


@pytest.fixture
def tiny_target(monkeypatch):
    """The name of a random target that is small."""
    monkeypatch.setitem(checkpoint.SIZES, "tiny", small_config())
    return "random:tiny"


# ------------------------------------------------------------------------------------------------
# arms


def test_scaling_arms_do_the_same_work(config):
    """Failure 15: two GPUs that see other samples than one, or make smaller steps."""
    shape = configure(vars(train), [config.recipe])
    arms = scaling.all_arms(config, shape)
    samples = {}
    batches = {}
    for arm in arms:
        settings = configure(vars(train), arm.flags)
        assert (settings.parallel == "fsdp") == arm.way.endswith("fsdp")
        batch = settings.batch_size * settings.grad_accum_steps * arm.processes
        batches.setdefault(arm.group, set()).add(batch)
        samples.setdefault(arm.group, set()).add(batch * arm.steps)
    assert {*samples, "kill"} == set(scaling.GROUPS)
    for group in samples:
        assert len(samples[group]) == 1, group
    assert batches["float32"] == batches["bfloat16"] == batches["resume"] == {4}
    assert batches["full-eager"] == {4, 8}


def test_scaling_resumed_arms_come_after_their_sources(config):
    """A run that resumes from a checkpoint which is not there yet."""
    shape = configure(vars(train), [config.recipe])
    arms = scaling.all_arms(config, shape)
    turns = {}
    for place, arm in enumerate(arms):
        turns[arm.name] = (arm.turn, arm.processes, place)
    resumed = [arm for arm in arms if arm.resume_from is not None]
    assert len(resumed) == 5
    for arm in resumed:
        source = f"bfloat16-{arm.way.split('-then-')[0]}"
        assert scaling.run_dir(config, source) == os.path.dirname(arm.resume_from)
        assert turns[source] < turns[arm.name]


def test_scaling_measures_the_run_of_train_py(small_run, tmp_path):
    """Failure 15: steps that are timed but are not those that train.py makes."""
    settings, _ = small_run
    config_file = write_config(tmp_path / "small.py", settings)
    run, held_out, _ = train.setup(settings)
    train.loop(run, held_out)
    log = read_jsonl(tmp_path / "run-dflash" / "log.jsonl")
    expected = [entry["loss"] for entry in log if entry["kind"] == "train"]

    flags = [str(config_file), f"--out_dir={tmp_path}/arm-dflash"]
    arm = {"name": "arm", "flags": flags, "steps": run.total_steps, "warm_up_steps": 2,
           "save_at": [3], "resume_from": None}
    _, result = training_arms.measure(arm)
    assert [step["loss"] for step in result["steps"]] == expected
    assert os.listdir(tmp_path / "arm-dflash") == ["step-000003"]
    seconds = sum(step["seconds"] for step in result["steps"][2:])
    assert result["samples_per_s"] == pytest.approx(4 * (run.total_steps - 2) / seconds)


# ------------------------------------------------------------------------------------------------
# figures


def test_scaling_time_of_a_step_is_split():
    """Failure 15: an exchange that runs beside products is called waiting, or the annotation of a
    kernel counts as a kernel."""
    def event(name, begin, end, category="kernel"):
        return {"name": name, "cat": category, "ts": begin, "dur": end - begin}

    seconds = training_arms.split_time([
        event("product", 0, 4e6),
        event("product", 3e6, 5e6),                 # on another stream, one second together
        event("ncclDevKernel_AllReduce", 4e6, 7e6),     # two seconds alone
        event("nccl:all_reduce", 0, 9e6, "gpu_user_annotation"),
        event("Memset", 8e6, 10e6, "gpu_memset"),   # after one idle second
        {"name": "process_name", "ph": "M"}])
    assert seconds == {"step": 10, "compute": 7, "exchange": 3, "exposed": 2, "idle": 1}


def test_scaling_is_relative_to_twice_one_gpu(config):
    """Failure 15: a share of another group's speed, or of one GPU's."""
    shape = configure(vars(train), [config.recipe])
    arms = scaling.speed_arms(config, shape, "full", "eager")
    results = {}
    for arm, speed in zip(arms, (10, 19, 16), strict=True):
        results[arm.name] = {"samples_per_s": speed, "tokens_per_s": 1.0, "step_s": 0.5,
                             "mfu": None, "peak_gb": None, "setup_peak_gb": None, "warm_up_s": 1}
    rows = scaling.speed_rows(arms, results)
    assert [row["scaling"] for row in rows] == [None, 0.95, 0.8]


def test_scaling_losses_apart():
    """Differences that cancel, or of other steps."""
    own = [{"loss": 2.0}, {"loss": 5.0}, {"loss": 3.0}]
    other = [{"loss": 2.0}, {"loss": 4.0}, {"loss": 4.0}]
    assert scaling.largest_difference(own, other, "loss") == 0.25
    with pytest.raises(ValueError):
        scaling.largest_difference(own[:2], other, "loss")


# ------------------------------------------------------------------------------------------------
# processes


def test_scaling_kills_the_process_that_it_means():
    """The launcher or process 0 killed instead of process 1."""
    sleepers = []
    for number in (0, 1):
        environment = os.environ | {"RANK": str(number)}
        sleepers.append(subprocess.Popen(["sleep", "60"], env=environment))
    try:
        assert scaling.child_of_rank(os.getpid(), 1) == sleepers[1].pid
        with pytest.raises(ValueError, match="no child of rank 2"):
            scaling.child_of_rank(os.getpid(), 2)
    finally:
        for sleeper in sleepers:
            sleeper.kill()
            sleeper.wait()


LOST = """
import os, signal, sys
import torch.distributed as dist
from training import parallel

parallel.join_processes("cpu")
if parallel.rank() == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    parallel.wait_for_all()
except RuntimeError as error:
    sys.exit(0 if parallel.is_lost_process(error) else f"not recognised: {error}")
sys.exit("the dead process was not missed")
"""


def test_lost_process_is_recognised():
    """A page of torch's traceback for a process whose only trouble is that another one died; or a
    wait without end."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    processes = []
    for number in (0, 1):
        environment = os.environ | {
            "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        processes.append(subprocess.Popen(
            [sys.executable, "-c", LOST], cwd=ROOT, env=environment, stderr=subprocess.PIPE,
            text=True))
    _, message = processes[0].communicate()
    processes[1].communicate()
    assert processes[0].returncode == 0, message
    assert processes[1].returncode == -9


# ------------------------------------------------------------------------------------------------
# synthetic rows, and targets with random weights


@pytest.mark.parametrize("length", (0, 150))
def test_synthetic_rows(main, tiny_target, tmp_path, length):
    """Rows that are not of the length asked for, or hold the id of the mask."""
    main(prepare, f"--target={tiny_target}", f"--out_dir={tmp_path}", f"--length={length}",
         "--max_length=1500")
    rows = Samples(str(tmp_path), "train", small_config().vocab_size, tokenizer=0)
    lengths = set()
    for i in range(len(rows)):
        tokens, mask = rows[i]
        lengths.add(len(tokens))
        assert tokens.max() < small_config().vocab_size - 1
        assert mask[:75].sum() == 0 and mask[100:].all()
    if length:
        assert lengths == {150}
    else:
        assert min(lengths) >= 200 and max(lengths) == 1500 and len(lengths) > 100


def test_train_py_takes_a_random_target(main, small_run, tiny_target, tmp_path):
    """A target without a tokenizer that is refused, although nothing is read as text."""
    settings, _ = small_run
    settings.epochs = 0.1
    settings.decode_prompts = 1
    settings.decode_tokens = 4
    skip = ("target", "data", "out_dir")
    config_file = write_config(tmp_path / "small.py", settings, skip)
    rows = tmp_path / "rows"
    main(prepare, f"--target={tiny_target}", f"--out_dir={rows}", "--rows=40", "--length=64")
    printed = main(train, str(config_file), f"--target={tiny_target}", f"--data={rows}",
                   f"--out_dir={tmp_path}/run-dflash")
    assert "held-out tau from real decoding" in printed
