"""
What pytest sets up: the environment of every test, and fixtures that several files use.

The environment must be set before torch and transformers are imported. pytest puts the project's
root on the path, because tests is a package there.
"""
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time

# where transformers copies the code of checkpoints that it loads; deleted at the end
MODULES = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = MODULES.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ["OMP_NUM_THREADS"] = "1"  # threads of two workers would fight for the cores

import numpy as np
import pytest
import torch

import bench
import train
from tokenizer import tokenizer_fingerprint
from configurator import configure
from data.samples import write_samples
from tests.common import NANO_TARGET, ROOT


@pytest.fixture(autouse=True)
def threads():
    """Put the number of torch's threads back after a test that changes it."""
    count = torch.get_num_threads()
    yield
    torch.set_num_threads(count)


@pytest.fixture
def traced_only(monkeypatch):
    """torch.compile traces functions but generates no kernels, which would take minutes."""
    torch_compile = torch.compile

    def compile_without_kernels(function, dynamic=None, options=None):
        return torch_compile(function, backend="aot_eager", dynamic=dynamic)

    monkeypatch.setattr(torch, "compile", compile_without_kernels)


@pytest.fixture
def main(monkeypatch, capsys):
    """main(script, *args) runs a script's main as from a shell in the project's root. It returns
    what was printed; of a failure, which must be one line, that line."""
    def call(script, *args):
        monkeypatch.chdir(ROOT)
        monkeypatch.setattr(sys, "argv", [script.__file__, *args])
        try:
            script.main(list(args))
        except SystemExit as end:
            # a string: Python prints it, and ends with status 1
            assert isinstance(end.code, str), end.code
            assert "\n" not in end.code, end.code
            return end.code
        return capsys.readouterr().out
    return call


@pytest.fixture
def run_bench(monkeypatch, capsys, tmp_path):
    """run_bench(*args) runs `python bench.py ARGS` with its reports in tmp_path. It returns the
    last line printed, parsed. differs: whether it must end with the news that outputs differ."""
    def call(*args, differs=False):
        monkeypatch.chdir(ROOT)
        argv = [*args, f"--out_dir={tmp_path}"]
        monkeypatch.setattr(sys, "argv", ["bench.py", *argv])
        ending = contextlib.nullcontext()
        if differs:
            ending = pytest.raises(SystemExit, match="differs")
        with ending:
            bench.main(argv)
        return json.loads(capsys.readouterr().out.splitlines()[-1])
    return call


@pytest.fixture
def small_run(tmp_path):
    return new_small_run(tmp_path)


def new_small_run(tmp_path):
    """(config, rows): train.py's configuration for a run of seconds on the nano target, and its
    rows (tokens, supervised), which are of unequal lengths and also lie in config.data."""
    r = np.random.default_rng(0)
    rows = []
    for length in r.integers(10, 60, 20):
        tokens = r.integers(0, 500, length)
        supervised = (np.arange(length) >= length // 2).astype(np.int64)
        rows.append((tokens, supervised))
    folder = str(tmp_path / "data")
    meta = {"vocab_size": 512, "tokenizer": tokenizer_fingerprint(NANO_TARGET)}
    write_samples(folder, {"train": rows, "val": rows[:3]}, meta)

    config = configure(vars(train), [])
    vars(config).update(
        target=NANO_TARGET, data=folder, out_dir=str(tmp_path / "run-dflash"), num_layers=1,
        num_heads=4, num_kv_heads=2, head_dim=32, intermediate_size=64, target_layer_ids=(1, 3),
        num_anchors=64, batch_size=2, grad_accum_steps=2, max_length=128, pad_to_multiple_of=64,
        lr=1e-2, warmup=0.2, epochs=1.2, log_every=1, eval_every=3, save_every=3, device="cpu",
        dtype="float32")
    return config, rows


@pytest.fixture(scope="session")
def served():
    """Address of `transformers serve` with the nano target, in a process of its own. The first
    test of a worker that needs it starts it."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    program = "import sys; from transformers.cli.transformers import main; sys.exit(main())"
    command = [sys.executable, "-c", program, "serve", NANO_TARGET, "--device=cpu",
               "--dtype=float32", "--host=127.0.0.1", f"--port={port}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command, **quiet) as process:
        try:
            wait_for(port, process)
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            process.terminate()


def wait_for(port, process):
    """Wait until a server accepts connections."""
    for _ in range(300):
        assert process.poll() is None, "the server did not start"
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        time.sleep(0.2)
