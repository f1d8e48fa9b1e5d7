"""Training with several processes: modes that do different work, samples and targets that train.py
does not take, a lost process that nobody names."""
import json
import os
import socket
import subprocess
import sys
from types import SimpleNamespace

import pytest

import bench
import checkpoint
import train
from benchmarks import scaling
from configurator import configure
from data.samples import Samples
from data.synthetic import prepare
from tests.common import ROOT, read_jsonl, small_config, write_config


@pytest.fixture
def tiny_target(monkeypatch):
    """The name of a random target that is small."""
    monkeypatch.setitem(checkpoint.SIZES, "tiny", small_config())
    return "random:tiny"


def test_scaling_compares_modes_with_the_same_samples(run_bench, monkeypatch, tmp_path):
    """Failure 15: two processes see other samples than one, a speed is compared with the wrong run,
    or losses are compared with other steps."""
    results = {"ddp1": (10, [2.0, 4.0]), "ddp2": (19, [2.0, 5.0]), "fsdp2": (16, [1.0, 4.0]),
               "ddp4": (40, [2.0, 4.0]), "fsdp4": (20, [2.0, 4.0])}
    samples = []

    def run(command, stdout, **options):
        """Instead of training: write the result by hand."""
        path, steps, *flags = command[command.index("benchmarks.scaling") + 1:]
        config = configure(vars(train), flags)
        name = os.path.basename(path).removesuffix(".json")
        processes = int(name[-1])
        assert name == f"{config.parallel}{processes}"
        assert steps == "3"
        assert (f"--nproc_per_node={processes}" in command) == (processes > 1)
        samples.append(processes * config.batch_size * config.grad_accum_steps)
        speed, losses = results[name]
        row = {"processes": processes, "samples_per_s": speed, "mfu": None, "peak_gb": None,
               "steps": [{"loss": loss, "grad_norm": 1.0} for loss in losses]}
        with open(path, "w") as f:
            json.dump(row, f)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(scaling, "subprocess", SimpleNamespace(run=run))
    report = run_bench("scaling", "--processes=1,2,4", "--steps=3")
    assert samples == [4 * 8] * 5  # config/nano.py has 8 samples per step
    assert [row["scaling"] for row in report["rows"]] == [1, 0.95, 0.8, 1, 0.5]
    assert [row["loss_difference"] for row in report["rows"]] == [0, 0.25, 0.5, 0, 0]
    with pytest.raises(SystemExit, match="must divide the largest"):
        run_bench("scaling", "--processes=3,4")


def test_scaling_names_the_log_of_a_failed_process(tmp_path):
    """A failed run whose empty result is compared with the others; a link under the name of the log
    directs it to a file of the user."""
    (tmp_path / "notes").write_text("mine")
    (tmp_path / "ddp1.log").symlink_to(tmp_path / "notes")
    config = configure(vars(bench), [f"--out_dir={tmp_path}", "--device=cpu", "--processes=1,"])
    with pytest.raises(ValueError, match="training with 1 processes failed: see .*ddp1.log"):
        scaling.launch(config, 1, "ddp", 1)  # without samples
    assert "no meta.json" in (tmp_path / "ddp1.log").read_text()
    assert (tmp_path / "notes").read_text() == "mine"


def test_scaling_measures_the_run_of_train_py(small_run, tmp_path):
    """Failure 15: timed steps that differ from those of train.py; a warm-up that counts."""
    settings, _ = small_run
    run, held_out, _ = train.setup(settings)
    train.loop(run, held_out)
    log = read_jsonl(tmp_path / "run-dflash" / "log.jsonl")
    expected = [entry["loss"] for entry in log if entry["kind"] == "train"]

    settings.out_dir = f"{tmp_path}/other-dflash"
    _, result = scaling.measure_steps(settings, run.total_steps)
    assert [step["loss"] for step in result["steps"]] == expected
    seconds = sum(step["seconds"] for step in result["steps"][2:])
    assert result["samples_per_s"] == pytest.approx(4 * (run.total_steps - 2) / seconds)
    assert os.listdir(settings.out_dir) == []


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
