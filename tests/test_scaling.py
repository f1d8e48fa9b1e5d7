"""Training with several processes: modes that do different work, samples and targets that train.py
does not take, a lost process that nobody names."""
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

import checkpoint
import train
from benchmarks import scaling
from configurator import configure
from data.samples import Samples
from data.synthetic import prepare
from tests.common import ROOT, small_config, write_config


@pytest.fixture
def tiny_target(monkeypatch):
    """The name of a random target that is small."""
    monkeypatch.setitem(checkpoint.SIZES, "tiny", small_config())
    return "random:tiny"


def test_scaling_compares_modes_with_the_same_samples(run_bench, monkeypatch):
    """Failure 15: two processes see other samples than one, the warm-up counts, a speed is compared
    with the wrong run, losses are compared with other steps, or a failed run with others."""
    # of each mode: seconds of the two steps after the warm-up, and losses
    results = {"ddp1": (4.0, [2.0, 4.0]), "ddp2": (2.5, [2.0, 5.0]), "fsdp2": (4.0, [1.0, 4.0]),
               "ddp4": (1.0, [2.0, 4.0]), "fsdp4": (2.0, [2.0, 4.0])}
    samples = []

    def run(command, stdout, **options):
        """Instead of training: write a log by hand. The two steps of the warm-up took 100 s."""
        config = configure(vars(train), command[command.index(train.__file__) + 1:])
        processes = os.path.basename(stdout.name).split(".")[0][-1]
        assert (f"--nproc_per_node={processes}" in command) == (processes != "1")
        samples.append(int(processes) * config.batch_size * config.grad_accum_steps)
        if failing:
            return SimpleNamespace(returncode=1)
        seconds, losses = results[config.parallel + processes]
        with open(os.path.join(config.out_dir, "log.jsonl"), "w") as f:
            for step, elapsed in enumerate((50, 100, 100 + seconds / 4, 100 + seconds), 1):
                entry = {"step": step, "loss": losses[step % 2], "grad_norm": 1.0, "peak_gb": None,
                         "tokens_per_s": 640 * step / elapsed, "mfu": 3 * step / elapsed,
                         "seconds": elapsed}
                f.write(json.dumps(entry) + "\n")
        return SimpleNamespace(returncode=0)

    failing = False
    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run))
    rows = run_bench("scaling", "--processes=1,2,4", "--steps=4")["rows"]
    assert samples == [4 * 8] * 5  # config/nano.py has 8 samples per step
    assert [row["samples_per_s"] for row in rows] == pytest.approx([16, 25.6, 16, 64, 32])
    assert [row["tokens_per_s"] for row in rows] == pytest.approx([320, 512, 320, 1280, 640])
    assert [row["mfu"] for row in rows] == pytest.approx([1.5, 2.4, 1.5, 6, 3])
    assert [row["scaling"] for row in rows] == pytest.approx([1, 0.8, 0.5, 1, 0.5])
    assert [row["loss_difference"] for row in rows] == [0, 0.25, 0.5, 0, 0]
    failing = True
    for processes, message in (("1,", "training with 1 processes failed: see .*ddp1.log"),
                               ("3,4", "must divide the largest")):
        with pytest.raises(SystemExit, match=message):
            run_bench("scaling", f"--processes={processes}")


def test_scaling_reads_the_log_of_train_py(run_bench, monkeypatch, small_run, tmp_path):
    """train.py refuses a flag, takes another number of steps, or logs a figure under another
    name."""
    settings, _ = small_run
    recipe = write_config(tmp_path / "recipe.py", settings, ("target", "data", "out_dir"))

    def run(command, **options):
        train.main(command[command.index(train.__file__) + 1:])
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run))
    row, = run_bench("scaling", f"--recipe={recipe}", "--processes=1,", "--steps=3", "--mixed",
                     "--device=cpu", "--dtype=float32")["rows"]
    assert [entry["step"] for entry in row["log"]] == [1, 2, 3]
    assert row["samples_per_s"] > 0 and row["tokens_per_s"] > 0


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
