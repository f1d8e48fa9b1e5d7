"""
Numbers, folders, and arguments that make no sense end in one line, before a model is loaded.
"""
import copy
import json
import math
import os
import re
import shlex
import socket
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import checkpoint
import draft_decode
import fast
import train
from checkpoint import load_drafter, load_target
from configurator import check_ranges, script_keys
from draft_decode import generate, generate_many
from tests.common import NANO_DRAFTER, NANO_TARGET, edit_json, small_target, write_config
from tokenizer import load_tokenizer, tokenizer_fingerprint
from training import log as training_log
from training import setup as training_setup


@pytest.mark.parametrize("script, ranges", (
    (train, training_setup.RANGES), (draft_decode, draft_decode.RANGES)))
def test_every_number_has_a_range(script, ranges):
    """A new key is not checked, or a default is refused."""
    types, _ = script_keys(vars(script))
    numbers = [key for key, kind in types.items() if "int" in kind or "float" in kind]
    assert sorted(ranges) == sorted(numbers)
    check_ranges(SimpleNamespace(**vars(script)), ranges)


@pytest.mark.parametrize("key", training_setup.RANGES)
def test_numbers_out_of_range_are_refused_in_one_line(small_run, key):
    """A run of hours with a value that no run can have, or an error about something else."""
    config, _ = small_run
    lowest, highest = training_setup.RANGES[key]
    for value in (lowest - 1, highest * 10 + 1, math.nan, math.inf, 10**400):
        wrong = (value, value) if isinstance(getattr(config, key), tuple) else value
        with pytest.raises(ValueError, match=f"^{key} = .*: use .* to ") as error:
            training_setup.check_config(SimpleNamespace(**vars(config) | {key: wrong}))
        assert len(str(error.value)) < 200


@pytest.mark.parametrize("flag, hint", (
    ("--block_size=1", "error: block_size = 1: use 2 to 1024"),
    ("--num_kv_heads=3", "error: num_heads = 4 must be a multiple of num_kv_heads = 3"),
    ("--head_dim=31", "error: head_dim = 31: use an even number"),
    ("--betas=0.9", r"error: betas = \(0.9,\): use two numbers"),
    ("--max_length=10", "error: max_length = 10 is shorter than a block"),
    ("--lr=" + "9" * 500, "error: lr = inf: use 1e-12 to 10"),
    ("--seed=" + "9" * 5000, "command line: seed = '999"),
    ("--wandb_project=x", "error: wandb_project = 'x' needs the package wandb"),
    ("--device=cuda", "error: device = 'cuda', but torch sees no GPU"),
    ("--out_dir={file}", "error: cannot write to out_dir"),
    ("--out_dir=/proc/run", "error: cannot write to out_dir"),
    ("--target_layer_ids=3,1", r"error: target_layer_ids = \(3, 1\) must ascend"),
    ("--mask_token_id=512", "error: mask_token_id = 512 .* 512"),
    ("--resume", "error: nothing to resume"),
    ("--data=nowhere", "error: no meta.json in 'nowhere'"),
    ("--target=nowhere", "error: no .* 'nowhere'"),
    ("--weighting=linear", "error: weighting = 'linear': use decay or dpace"),
    ("--batch_size=64", "error: 20 samples are too few for a step"),
    ("--parallel=fsdp", "error: parallel = 'fsdp' .* torchrun"),
))
def test_training_mistakes_end_in_one_line(main, small_run, monkeypatch, tmp_path, flag, hint):
    """A traceback, or a mistake that is found after the target was loaded for minutes."""
    config_file = write_config(tmp_path / "small.py", small_run[0])
    if flag not in ("--batch_size=64", "--parallel=fsdp"):
        monkeypatch.setattr(train, "load_target", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setitem(sys.modules, "wandb", None)  # then its import fails
    line = main(train, str(config_file), flag.format(file=config_file))
    assert re.match(hint, line)
    assert len(line) < 200


def test_samples_without_an_anchor_are_refused(monkeypatch):
    """A run in which all losses are 0.0000 ends with a checkpoint and status 0."""
    samples = [(np.arange(6), np.array(mask)) for mask in ([0, 0, 1, 0, 1, 0], [0, 0, 0, 0, 1, 1])]
    monkeypatch.setattr(training_setup, "Samples", lambda *_: samples)
    config = SimpleNamespace(data="rows", max_length=5, target=NANO_TARGET)
    with pytest.raises(ValueError, match="no val sample in 'rows' .*max_length = 5"):
        training_setup.load_samples(config, "val", 9)
    config.max_length = 6
    assert training_setup.load_samples(config, "val", 9) == samples


def test_hub_names_without_a_network_fail_in_time(main, monkeypatch):
    """The hub's client tries for seconds to reach it; a name server that does not answer is waited
    for without a limit."""
    monkeypatch.setattr(checkpoint.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_: time.sleep(3) or [])
    checkpoint.hub_answers.cache_clear()
    began = time.monotonic()
    line = main(draft_decode, "--prompt=Hi", "--target=nobody/nothing-0.8b", "--device=cpu")
    assert time.monotonic() - began < 2
    checkpoint.hub_answers.cache_clear()
    assert line.startswith("error: no folder 'nobody/nothing-0.8b', and the hub does not give it")


def test_folders_can_be_paths(tmp_path):
    """A pathlib.Path ends in an AttributeError."""
    target = load_target(Path(NANO_TARGET))
    assert load_tokenizer(Path(NANO_TARGET))
    assert tokenizer_fingerprint(Path(NANO_TARGET)) == tokenizer_fingerprint(NANO_TARGET)
    drafter = load_drafter(Path(NANO_DRAFTER), target.config)
    checkpoint.save_drafter(drafter, tmp_path / "step-000001", "# card\n")
    assert load_drafter(tmp_path, target.config)


def test_log_of_a_stranger_overwrites_nothing(tmp_path, capfd):
    """A link in a run folder leads to a file of the user; a damaged line, or a list of the wrong
    length, stops --resume or the plot."""
    entry = {"kind": "val", "step": 1, "loss": 1.0, "tau": 2.0, "accepted_up_to_position": [0.5]}
    lines = ["\0\0", "[" * 10**5, "1", "{}", json.dumps(entry), json.dumps(entry)[:-5]]
    for key, values in {
            "step": ("1", True, -1, 2, 10**400), "loss": (None, 1, "\x1b[2J", 10**400),
            "tau": ([2.0], {}), "kind": ("\x1b[2J", ["val"]),
            "accepted_up_to_position": ([], [0.5, 0.5], 0.5, ["\x1b[2J"], [[0.5]])}.items():
        lines += [json.dumps(entry | {key: value}) for value in values]
    outside = tmp_path / "outside"
    outside.write_text("\n".join(lines))
    log = tmp_path / "log.jsonl"
    config = SimpleNamespace(out_dir=str(tmp_path), block_size=2)
    for target, kept in ((outside, [entry]), (tmp_path / "missing", [])):
        log.unlink(missing_ok=True)
        log.symlink_to(target)
        training_log.open_log(config, step=1).close()
        assert training_log.read_log(config) == kept
        assert not log.is_symlink()
        training_log.plot_training(str(tmp_path / "training.png"), kept, (1,))
    assert outside.read_text() == "\n".join(lines)
    assert not (tmp_path / "missing").exists()
    os.remove(log)
    os.mkfifo(log)
    training_log.open_log(config, step=1).close()  # does not hang
    assert "\x1b" not in "".join(capfd.readouterr())


def test_printed_commands_can_be_pasted(small_run):
    """A path with a space is two words; a command names another folder or another block size."""
    config, _ = small_run
    folder = "out/my runs/a-dflash/step-000006"
    source = config.data
    edit_json(Path(config.data) / "meta.json", source=source, thinking=True)
    lines = training_log.how_to_use(config, folder).splitlines()
    decode, measure, sglang, vllm = [shlex.split(line)[1:] for line in lines]
    pair = [f"--target={NANO_TARGET}", f"--drafter={folder}", "--thinking"]
    assert decode[:5] == ["python", "draft_decode.py", *pair]
    assert measure == ["python", "bench.py", "acceptance", *pair, f"--prompts={source}"]
    assert sglang[-3:] == [folder, "--speculative-num-draft-tokens", "16"]
    assert json.loads(vllm[-1]) == {
        "method": "dflash", "model": folder, "num_speculative_tokens": 15}


@pytest.mark.parametrize("change, hint", (
    ({"prompts": [1, 2]}, "prompt 0: a prompt must be one flat sequence"),
    ({"prompts": torch.ones(1, 2, 3)}, "a prompt must be one flat sequence"),
    ({"prompts": [np.ones(3)]}, "a prompt must be one flat sequence"),
    ({"stop_token_ids": "<|im_end|>"}, "stop_token_ids must be one flat sequence"),
    ({"stop_token_ids": np.int64(300)}, "stop token id 300 is outside"),
    ({"max_new_tokens": math.nan}, "max_new_tokens = nan: use an integer"),
    ({"slots": 0}, "slots = 0: use an integer"),
))
def test_arguments_that_make_no_sense_are_named(change, hint):
    """A bare error of Python or torch, an endless loop, or stop ids that never stop."""
    arguments = {"prompts": [[1]], "slots": 1} | change
    with pytest.raises(ValueError, match=hint):
        next(generate_many(small_target(), None, **arguments))


def test_prompts_and_stops_of_all_kinds_are_read():
    """A tensor of stop ids never stops, because tensors are equal to no int."""
    target = small_target()
    first = next(generate(target, None, [1, 2])).tokens[0]
    for prompt in (torch.tensor([1, 2]), np.array([1, 2])):
        for stops in (first, np.int64(first), torch.tensor(first), torch.tensor([first])):
            output, = generate(target, None, prompt, stop_token_ids=stops)
            assert output.tokens == [first]


def test_logits_that_are_not_finite_are_an_error(main, monkeypatch):
    """Broken weights write "!!!!!" with a tau of 15.75, identical to the target alone."""
    broken = load_target(NANO_TARGET)
    broken.norm.weight.data[0] = math.nan
    monkeypatch.setattr(draft_decode, "load_target", lambda *_: broken)
    line = main(draft_decode, "--prompt=Hi", "--device=cpu")
    assert line.startswith("error: the target in 'data/nano/target' gives logits that are NaN")

    # later too: a token of the answer has a broken embedding
    target = copy.deepcopy(small_target("untied"))
    answer = [output.tokens[0] for output in generate(target, None, [1, 2], max_new_tokens=9)]
    bad = next(i for i in range(3, 8) if answer[i] not in [0, 1, 2, *answer[:i]])
    target.embed_tokens.weight.data[answer[bad]] = math.nan
    are_finite = [output.is_finite for output in generate(target, None, [1, 2], max_new_tokens=9)]
    assert are_finite[:bad + 2] == [True] * (bad + 1) + [False]


@pytest.mark.parametrize("before", ("none", "tf32"))
def test_only_bf16_forwards_multiply_in_tf32(before):
    """A caller's own code multiplies with 11 bits after it has loaded a bf16 target, or between
    two rounds; the delta rule of a bf16 target runs at half its speed."""
    setting = torch.backends.cuda.matmul
    setting.fp32_precision = before
    seen = []
    try:
        for dtype in ("bfloat16", "float32"):
            target = load_target(NANO_TARGET, dtype=dtype)
            fast.prepare_for_decoding(target)
            target.norm.register_forward_hook(lambda *_: seen.append(setting.fp32_precision))
            for _ in generate(target, None, [1, 2, 3], max_new_tokens=3):
                assert setting.fp32_precision == before
        assert setting.fp32_precision == before
    finally:
        setting.allow_tf32 = False
        setting.fp32_precision = "none"
    half = len(seen) // 2
    assert seen == ["tf32"] * half + [before] * half
