"""Training with several processes: modes that do different work, samples and targets that train.py
does not take, a lost process that nobody names."""
import os
import socket
import subprocess
import sys

import pytest

import checkpoint
import train
from benchmarks import scaling, scaling_worker
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


# --------------------------------------------------------------------------------------------------
# modes


def test_scaling_modes_have_the_same_samples(config):
    """Failure 15: two processes that see other samples than one, or resume from the wrong run."""
    config.processes = (1, 2, 4)
    train_config = configure(vars(train), list(config.train_args))
    modes = scaling.all_modes(config)
    assert [mode.name for mode in modes] == ["one", "ddp2", "fsdp2", "ddp4", "fsdp4"]
    for mode in modes:
        run = scaling.run_of(config, train_config, mode, source=modes[1])
        settings = configure(vars(train), run["flags"])
        batch = settings.batch_size * settings.grad_accum_steps * mode.processes
        assert batch == 4 * train_config.batch_size * train_config.grad_accum_steps
        assert settings.parallel == mode.parallel
        source = scaling.run_of(config, train_config, modes[1])
        source_dir = configure(vars(train), source["flags"]).out_dir
        assert settings.resume_from == f"{source_dir}/step-{source['save_at']:06d}"
        assert settings.out_dir != source_dir


def test_scaling_refuses_numbers_of_processes_without_the_same_samples(config):
    """3 and 4 processes compared, although no step can have the same samples; too few steps."""
    for processes in ((3, 4), (0, 2), (1,)):
        config.processes = processes
        with pytest.raises(ValueError, match="must divide the largest"):
            scaling.all_modes(config)
    config.steps = 4
    with pytest.raises(ValueError, match="steps = 4"):
        scaling.all_modes(config)


def test_scaling_measures_the_run_of_train_py(small_run, tmp_path):
    """Failure 15: timed steps that differ from those of train.py."""
    settings, _ = small_run
    config_file = write_config(tmp_path / "small.py", settings)
    run, held_out, _ = train.setup(settings)
    train.loop(run, held_out)
    log = read_jsonl(tmp_path / "run-dflash" / "log.jsonl")
    expected = [entry["loss"] for entry in log if entry["kind"] == "train"]

    flags = [str(config_file), f"--out_dir={tmp_path}/other-dflash"]
    _, result = scaling_worker.measure_run({"flags": flags, "steps": run.total_steps, "save_at": 3})
    assert [step["loss"] for step in result["steps"]] == expected
    assert os.listdir(tmp_path / "other-dflash") == ["step-000003"]
    seconds = sum(step["seconds"] for step in result["steps"][2:])
    assert result["samples_per_s"] == pytest.approx(4 * (run.total_steps - 2) / seconds)


def result_by_hand(samples_per_s, losses):
    steps = [{"loss": loss, "grad_norm": 1.0} for loss in losses]
    return {"samples_per_s": samples_per_s, "tokens_per_s": 1.0, "mfu": None, "peak_gb": None,
            "steps": steps}


def test_scaling_tables_by_hand(config):
    """Failure 15: a speed compared with the wrong run, or losses that are compared with other
    steps."""
    results = {
        "one": result_by_hand(10, [2.0, 4.0, 5.0]),
        "ddp2": result_by_hand(19, [2.0, 4.0, 4.0]),
        "fsdp2": result_by_hand(16, [1.0, 4.0, 5.0]),
        "one-then-ddp2": result_by_hand(1, [4.0, 5.0]),
        "ddp2-then-one": result_by_hand(1, [4.0, 5.0]),
        "one-then-fsdp2": result_by_hand(1, [4.0, 4.0]),
        "fsdp2-then-one": result_by_hand(1, [4.0, 5.0])}
    modes = scaling.all_modes(config)
    rows = scaling.mode_rows(modes, results)
    assert [row["scaling"] for row in rows] == [1.0, 0.95, 0.8]
    assert [row["loss difference"] for row in rows] == [0, 0.2, 0.5]
    rows = scaling.resumed_rows(modes, results)
    assert [(row["resumed"], row["loss difference"]) for row in rows] == [
        ("one-then-ddp2", 0), ("ddp2-then-one", 0.25), ("one-then-fsdp2", 0.2),
        ("fsdp2-then-one", 0)]
    with pytest.raises(ValueError):
        scaling.largest_difference([{"loss": 1.0}], results["one"]["steps"], "loss")


def test_scaling_names_the_log_of_a_failed_process(config, tmp_path):
    """A failed run whose empty result is compared with the others."""
    config.out_dir = str(tmp_path)
    config.device = "cpu"
    run = {"name": "one", "flags": ["--data=no_such_folder"], "steps": 1, "save_at": None}
    with pytest.raises(ValueError, match="one failed: its output is in .*one.log"):
        scaling.launch(config, scaling.ONE, [run])


# --------------------------------------------------------------------------------------------------
# processes


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
    """torch's long traceback in a process because a different one died, or an endless wait."""
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


# --------------------------------------------------------------------------------------------------
# synthetic samples, and targets with random weights


@pytest.mark.parametrize("length", (0, 150))
def test_synthetic_rows(main, tiny_target, tmp_path, length):
    """Samples with a wrong length, or with the id of the mask."""
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


def test_train_py_takes_a_random_target(main, monkeypatch, small_run, tiny_target, tmp_path):
    """A target without a tokenizer that is refused, although no text is read."""
    settings, _ = small_run
    settings.epochs = 0.1
    settings.decode_prompts = 1
    monkeypatch.setattr(train, "DECODE_TOKENS", 4)
    skip = ("target", "data", "out_dir")
    config_file = write_config(tmp_path / "small.py", settings, skip)
    rows = tmp_path / "rows"
    main(prepare, f"--target={tiny_target}", f"--out_dir={rows}", "--rows=40", "--length=64")
    printed = main(train, str(config_file), f"--target={tiny_target}", f"--data={rows}",
                   f"--out_dir={tmp_path}/run-dflash")
    assert "held-out tau from real decoding" in printed
