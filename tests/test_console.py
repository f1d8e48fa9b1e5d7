"""
What a shell does to a command: a pipe that closes, bytes that are no text, Ctrl-C, a umask.
"""
import os
import subprocess
import sys

import pytest
import torch

import draft_decode
from checkpoint import save_weights
from tests.common import NANO_DRAFTER, NANO_TARGET, ROOT, nano, questions

PRINTS_A_LOT = """
import sys
from console import survive_closed_output
survive_closed_output()
for i in range(20000):
    print(i, flush={flush})
open(sys.argv[1], "w").write("report")
"""


@pytest.mark.parametrize("flush", (True, False))
def test_closed_pipe_ends_no_run(tmp_path, flush):
    """`| head` ends a measurement in a traceback, without its report."""
    report = tmp_path / "report"
    process = subprocess.Popen(
        [sys.executable, "-c", PRINTS_A_LOT.format(flush=flush), str(report)], cwd=ROOT,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "0\n"
    process.stdout.close()
    errors = process.stderr.read()
    assert process.wait() == 0
    assert errors == ""
    assert report.read_text() == "report"


def settings(**changes):
    """The namespace of draft_decode for the nano pair."""
    argv = [f"--target={NANO_TARGET}", f"--drafter={NANO_DRAFTER}", "--device=cpu"]
    for key, value in changes.items():
        argv.append(f"--{key}={value}")
    return draft_decode.configure(vars(draft_decode), argv)


def test_prompt_that_is_no_text_is_refused_in_one_line():
    """A traceback of the tokenizer for bytes that are no UTF-8."""
    with pytest.raises(ValueError, match="no valid UTF-8"):
        draft_decode.decode(settings(prompt="abc \udcff"))


def test_ctrl_c_ends_the_comparison_only(monkeypatch, capsys):
    """Ctrl-C while the target alone runs, minutes on a large one, loses the answer's own
    figures."""
    real = draft_decode.timed_generate

    def interrupted(target, drafter, *args, **options):
        if drafter is None:
            raise KeyboardInterrupt
        return real(target, drafter, *args, **options)

    monkeypatch.setattr(draft_decode, "timed_generate", interrupted)
    line = draft_decode.decode(settings(prompt=questions()[0], color=False))
    assert "tau" in line
    assert "target alone" not in line


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)))
def test_weights_are_readable_as_the_umask_says(tmp_path, umask, mode):
    """Weights with mode 0600, which an engine that runs as another user cannot read."""
    path = str(tmp_path / "model.safetensors")
    before = os.umask(umask)
    try:
        save_weights({"a": torch.ones(2)}, path)
    finally:
        os.umask(before)
    assert os.stat(path).st_mode & 0o777 == mode


def test_features_only_without_layers_is_refused_in_one_line():
    """max() of nothing, for a caller who asked for the features of no layer."""
    target, _ = nano()
    with pytest.raises(ValueError, match="target_layer_ids"):
        target(torch.tensor([[1, 2]]), features_only=True)
