"""
Command lines: what a person can get wrong ends in one line that says what is wrong, and status 1.

The failure that all these tests catch is a traceback, or worse, success: a script that runs for an
hour on a broken file, or goes on with a default. The `main` fixture asserts that a failure is one
line.
"""
import json
import os
import re
from types import SimpleNamespace

import pytest
import torch

from fast import cpu
import draft_decode
import train
from tokenizer import chat_prompt, tokenizer_fingerprint
from data import conversations, regenerate
from data.math500 import prepare as math500
from data.samples import write_samples
from draft_decode import Generation, RoundOutput, summary
from model import DFlashDraftModel
from sampling import Sampling
from target import Target
from tests.common import (NANO_TARGET, edit_json, nano, nano_copy, put_nan, write_config,
                          write_jsonl)

# ------------------------------------------------------------------------------------------------
# decoding

CPU = ("--device=cpu", "--dtype=float32")


def test_cli_decodes_and_compares(main):
    """Failure 15: a speedup reported without comparing outputs."""
    out = main(draft_decode, "--prompt=What is 3 * 14?", "--max_new_tokens=12", *CPU)
    assert "12 tokens | " in out
    assert "speedup" in out
    assert out.rstrip().endswith("identical")


def test_cli_keys_arrive_where_tokens_are_chosen(main, monkeypatch):
    """A key of sampling, a limit, a dtype or thinking that does not arrive: the answer is none that
    was asked for. With and without the comparison, and with --raw."""
    requests = []
    compiled = []

    def keep(target, drafter, prompt_ids, max_new_tokens, stops, tokens_per_forward=None, sampling=None,
             decoders=None, on_piece=None):
        requests.append((prompt_ids, tokens_per_forward))
        assert max_new_tokens == 9
        assert stops == {502, 504}
        assert sampling == Sampling(0.7, top_k=5, top_p=0.9, seed=3, draft_temperature=0.5)
        assert target.embed_tokens.weight.dtype == torch.bfloat16
        if drafter is not None:
            assert drafter.fc.weight.dtype == torch.bfloat16
        return generation([1, 2, 3], [2], 1.0)

    def keep_generate(*request):
        keep(*request)
        return iter(())

    monkeypatch.setattr(draft_decode, "timed_generate", keep)
    monkeypatch.setattr(draft_decode, "generate", keep_generate)
    for model in (Target, DFlashDraftModel):
        monkeypatch.setattr(model, "compile_decoding", lambda self: compiled.append(type(self)))
    flags = (
        "--prompt=Hi", "--device=cpu", "--dtype=bfloat16", "--max_new_tokens=9", "--top_k=5",
        "--temperature=0.7", "--top_p=0.9", "--seed=3", "--draft_temperature=0.5")
    _, tokenizer = nano()
    plain = chat_prompt(tokenizer, "Hi")

    main(draft_decode, *flags)
    # the warm-up of both, then the drafter and the target alone in both shapes
    assert requests == [(plain, None), (plain, 1), (plain, None), (plain, 16), (plain, 1)]
    requests.clear()
    assert not compiled
    main(draft_decode, *flags, "--compare=False", "--thinking", "--compile")
    assert requests == [(chat_prompt(tokenizer, "Hi", thinking=True), None)]
    assert compiled == [Target, DFlashDraftModel]
    requests.clear()
    main(draft_decode, *flags, "--compare=False", "--raw")
    assert requests == [(tokenizer.encode("Hi"), None)]


@pytest.mark.parametrize("variable, largest, threads_used", (
    (None, cpu.SMALL, 1), (None, 1000, 2), ("2", cpu.SMALL, 2)))
def test_cli_decodes_a_small_target_with_one_thread(
        main, monkeypatch, variable, largest, threads_used):
    """Beside other busy processes two threads wait for each other: 22 tokens/s in place of 280. A
    large target, or a user who chose the number, is left alone."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(cpu, "SMALL", largest)
    torch.set_num_threads(2)
    main(draft_decode, "--prompt=What is 2 + 3?", "--compare=False")
    assert torch.get_num_threads() == threads_used


def test_cli_prints_guesses_and_choices_in_their_colors(capsys):
    """A guess painted as the target's own token; half of a character printed, or lost."""
    texts = {(): "", (1,): "a", (1, 2): "ab", (1, 2, 3): "ab\ufffd", (1, 2, 3, 4): "abé"}

    def decode(tokens, skip_special_tokens):
        assert skip_special_tokens
        return texts[tuple(tokens)]

    printer = draft_decode.Printer(SimpleNamespace(decode=decode), color=True)
    printer([1], RoundOutput([1], 0))
    printer([1, 2, 3], RoundOutput([2, 3], 1))    # one guess was right; the second token is half
    printer([1, 2, 3, 4], RoundOutput([4], 0))
    own, guess, end = "\033[34m", "\033[32m", "\033[0m"  # blue, green, plain
    assert capsys.readouterr().out == f"{own}a{end}{guess}b{end}{own}é{end}"
    printer = draft_decode.Printer(SimpleNamespace(decode=decode), color=False)
    printer([1, 2], RoundOutput([1, 2], 1))
    assert capsys.readouterr().out == "ab"


def generation(tokens, lengths, seconds):
    """A finished generation of the given tokens, in rounds of the given lengths."""
    rounds = []
    first = 1  # the prompt's own token is in no round
    for length in lengths:
        rounds.append(RoundOutput(tokens[first:first + length], length - 1))
        first += length
    return Generation(tokens, rounds, seconds)


def test_cli_summary_by_hand():
    """Failure 15: a rate that counts the prompt's own token, which is in no round; a speedup over
    the slower way to run the target alone; outputs that differ and are called identical."""
    tokens = list(range(11))
    ours = generation(tokens, [6, 4], seconds=1.0)
    same_shape = generation(tokens, [1] * 10, seconds=10.0)
    one_row = generation(tokens, [1] * 10, seconds=5.0)
    line = summary(ours, same_shape, one_row)
    assert line.startswith("11 tokens | 2 rounds | tau 5.00 | 10 tokens/s")
    assert re.search(r"target alone\D* 2 tokens/s\W+speedup 5\.00", line)
    assert line.endswith("identical")
    line = summary(ours, None, None)
    assert line == "11 tokens | 2 rounds | tau 5.00 | 10 tokens/s"

    other = generation(tokens[:7] + [99] + tokens[8:], [1] * 10, seconds=10.0)
    assert summary(ours, other, one_row).endswith("first difference at token 7")
    shorter = generation(tokens[:5], [1] * 4, seconds=10.0)
    assert summary(ours, shorter, one_row).endswith("first difference at token 5")


MISTAKES = (
    (["--prompt= "], "error: the prompt is empty"),
    (["--prompt=\udcff"], "error: the prompt is no valid UTF-8"),
    (["--raw", "--prompt=" + "7 " * 600],
     r"error: the prompt has 1\d\d\d tokens, too many .* 1024"),
    (["--target=nowhere", "--prompt=x"], "error: no .* in 'nowhere'"),
    (["--drafter=nowhere", "--prompt=x"], "error: no drafter in 'nowhere'.*train.py"),
    (["--dtype=float16", "--prompt=x"], "error: dtype = 'float16'"),
    (["--max_new_tokens=0", "--prompt=x"], "error: max_new_tokens = 0"),
    (["--top_p=0", "--prompt=x"], "error: .*top_p is above 0"),
    (["--promt=x"], "command line: unknown key 'promt', the nearest is 'prompt'"),
)


@pytest.mark.parametrize("arguments, hint", MISTAKES)
def test_cli_mistakes_end_in_one_line(main, arguments, hint):
    """A traceback, or success, for what a user can get wrong."""
    assert re.match(hint, main(draft_decode, *arguments))


@pytest.fixture
def decode_fails(main):
    """decode_fails(hint, *args): draft_decode.py with these flags fails with that hint."""
    def call(hint, *args):
        message = main(draft_decode, "--prompt=x", *CPU, *args)
        assert re.search(hint, message), message
    return call


def cut_off(path, count):
    """Cut the last bytes off a file."""
    os.truncate(path, path.stat().st_size - count)


# a target that is broken


@pytest.fixture
def target(tmp_path):
    return nano_copy(tmp_path / "target", "target")


def test_broken_target_cut_off(target, decode_fails):
    cut_off(target / "model.safetensors", 9)
    decode_fails("cannot load .*model.safetensors", f"--target={target}")


def test_broken_target_without_weights(target, decode_fails):
    (target / "model.safetensors").unlink()
    decode_fails("cannot load .*model.safetensors", f"--target={target}")


def test_broken_target_with_a_bad_index_of_shards(target, decode_fails):
    index = target / "model.safetensors.index.json"
    for text in ("[]", "{}", "{", '{"weight_map": {"x": "no.safetensors"}}'):
        index.write_text(text)
        decode_fails("cannot load .*safetensors", f"--target={target}")


def test_broken_target_of_other_shapes(target, decode_fails):
    edit_json(target / "config.json", intermediate_size=400)
    decode_fails(r"up_proj.weight is \[384, 128\], not \[400", f"--target={target}")


def test_broken_target_with_fewer_layers(target, decode_fails):
    edit_json(target / "config.json", num_hidden_layers=1, layer_types=["linear_attention"])
    decode_fails("layers.1.input_layernorm.weight is left over", f"--target={target}")


def test_broken_target_with_nan_weights(target, decode_fails):
    put_nan(target / "model.safetensors", "model.norm.weight")
    decode_fails("norm.weight is not finite", f"--target={target}")


def test_broken_target_config_that_is_not_json(target, decode_fails):
    for text in ("{", "[]"):
        (target / "config.json").write_text(text)
        decode_fails("cannot use .*config.json", f"--target={target}")


def test_broken_target_config_without_a_key(target, decode_fails):
    edit_json(target / "config.json", remove=["linear_key_head_dim"])
    decode_fails("linear_key_head_dim", f"--target={target}")


def test_broken_target_of_experts(target, decode_fails):
    edit_json(target / "config.json", num_experts=8)
    decode_fails("mixture-of-experts", f"--target={target}")


def test_broken_target_without_tokenizer(target, decode_fails):
    (target / "tokenizer.json").unlink()
    decode_fails("no tokenizer.json in", f"--target={target}")


def test_broken_target_without_chat_template(target, decode_fails):
    (target / "chat_template.jinja").unlink()
    decode_fails("no chat template: .*--raw", f"--target={target}")


def test_broken_target_with_the_tokenizer_of_another(target, decode_fails):
    text = (target / "tokenizer.json").read_text()
    assert '"x": 87,' in text
    (target / "tokenizer.json").write_text(text.replace('"x": 87,', '"x": 987,'))
    decode_fails("vocabulary of 512", f"--target={target}")


def test_broken_hub_id_while_offline(decode_fails):
    decode_fails("hub does not give it.*folder", "--target=Qwen/Qwen3.5-0.8B")


def test_broken_request_for_text_from_random_weights(decode_fails):
    decode_fails("no tokenizer", "--target=random:27b")


def test_broken_prompt_that_fills_the_context(decode_fails):
    decode_fails("too many .* of 1024", "--prompt=" + "7 " * 600)


# a drafter that is broken


@pytest.fixture
def drafter(tmp_path):
    return nano_copy(tmp_path / "x-dflash", "drafter-dflash")


def test_broken_drafter_cut_off(drafter, decode_fails):
    os.truncate(drafter / "model.safetensors", 999)
    decode_fails("cannot load .*model.safetensors", f"--drafter={drafter}")


def test_broken_drafter_with_nan_weights(drafter, decode_fails):
    put_nan(drafter / "model.safetensors", "fc.weight")
    decode_fails("fc.weight is not finite", f"--drafter={drafter}")


def test_broken_drafter_of_a_larger_target(drafter, decode_fails):
    edit_json(drafter / "config.json", num_target_layers=24)
    decode_fails("num_target_layers is 24, .* 12", f"--drafter={drafter}")


def test_broken_drafter_with_the_config_of_another_model(drafter, decode_fails):
    edit_json(drafter / "config.json", remove=["dflash_config"])
    decode_fails("no dflash_config", f"--drafter={drafter}")

# ------------------------------------------------------------------------------------------------
# preparing data

CHAT = {"messages": [
    {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}


@pytest.fixture
def prepare_fails(main, tmp_path):
    """prepare_fails(hint, *args): data/conversations.py fails with that hint, and leaves no rows
    that look finished."""
    folder = tmp_path / "rows"

    def call(hint, *args):
        message = main(conversations, f"--target={NANO_TARGET}", f"--out_dir={folder}",
                       "--num_proc=1", *args)
        assert re.search(hint, message), message
        assert not (folder / "meta.json").exists()
    return call


def test_broken_key_on_the_command_line(prepare_fails):
    prepare_fails("unknown key 'sorce', the nearest is 'source'", "--sorce=x")


def test_broken_source_that_is_not_there(prepare_fails):
    prepare_fails("no file 'no/rows'", "--source=no/rows")


def test_broken_source_that_is_empty(prepare_fails, tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [])
    prepare_fails("0 rows to train on", f"--source={source}")


def test_broken_source_without_an_assistant(prepare_fails, tmp_path):
    row = {"messages": [{"role": "user", "content": "q"}]}
    source = write_jsonl(tmp_path / "x.jsonl", [row] * 3)
    hint = "0 rows to train on .* 3 were read, dropped: .*no assistant's answer.*3"
    prepare_fails(hint, f"--source={source}")


def test_broken_source_with_a_line_that_is_not_json(prepare_fails, tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [CHAT, '{"messages": ['])
    prepare_fails("x.jsonl, line 2: ", f"--source={source}")


def test_broken_source_with_a_line_that_is_not_text(prepare_fails, tmp_path):
    (tmp_path / "x.jsonl").write_bytes(b"{\xff}")
    prepare_fails("x.jsonl, line 1: .*utf-8", f"--source={tmp_path}/x.jsonl")


def test_broken_source_that_is_no_parquet(prepare_fails, tmp_path):
    source = write_jsonl(tmp_path / "x.parquet", [CHAT])
    prepare_fails("cannot read .*parquet", f"--source={source}")


def test_broken_output_below_a_file(prepare_fails, tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [CHAT] * 3)
    prepare_fails("Not a directory", f"--source={source}", f"--out_dir={source}/rows")


def test_broken_request_for_answers_to_nothing(main):
    assert "give --prompts and --out" in main(regenerate, "--out=x")


def test_broken_prompts_without_a_question(main, tmp_path):
    prompts = write_jsonl(tmp_path / "x.jsonl", [{"a": 1}])
    message = main(regenerate, f"--prompts={prompts}", f"--out={tmp_path}/y.jsonl")
    assert "row 1: no question" in message


def test_broken_problems_without_an_answer(main, tmp_path):
    source = write_jsonl(tmp_path / "x.jsonl", [{"problem": "1"}])
    message = main(math500, f"--source={source}", f"--out={tmp_path}/y")
    assert "row 1: no text" in message

# ------------------------------------------------------------------------------------------------
# training

TRAINING_MISTAKES = (
    ("--resume", "error: nothing to resume"),
    ("--data=nowhere", "error: no meta.json in 'nowhere'"),
    ("--mask_token_id=512", "error: mask_token_id = 512 .* 512"),
    ("--target_layer_ids=1,11", "error: target_layer_ids = .*0 .. 10"),
    ("--target=nowhere", "error: no .* 'nowhere'"),
    ("--batch_size=64", "error: 20 samples make no step"),
    ("--batch_size=0", "error: batch_size = 0: use 1 or more"),
    ("--grad_accum_steps=0", "error: grad_accum_steps = 0: use 1 or more"),
    ("--num_anchors=0", "error: num_anchors = 0: use 1 or more"),
    ("--pad_to_multiple_of=0", "error: pad_to_multiple_of = 0: use 1 or more"),
    ("--max_consecutive_skips=0", "error: max_consecutive_skips = 0: use 1 or more"),
    ("--eval_samples=0", "error: eval_samples = 0: use 1 or more"),
    ("--keep_checkpoints=0", "error: keep_checkpoints = 0: use 1 or more"),
    ("--device=gpu", "error: device = 'gpu': use cpu or cuda"),
    ("--weighting=linear", "error: weighting = 'linear': use decay or dpace"),
    ("--initializer_range=-1", "error: initializer_range = -1.0: first weights need a standard"),
    ("--attention=flex", "error: attention = 'flex' has no backward on CPUs"),
    ("--parallel=fsdp", "error: parallel = 'fsdp' .* torchrun"),
)


@pytest.mark.parametrize("flag, hint", TRAINING_MISTAKES)
def test_cli_training_mistakes_end_in_one_line(main, small_run, tmp_path, flag, hint):
    """A traceback after an hour, or a run that overwrites another."""
    config, _ = small_run
    config_file = write_config(tmp_path / "small.py", config)
    assert re.match(hint, main(train, str(config_file), flag))


@pytest.fixture
def training_fails(main, tmp_path):
    """training_fails(hint): train.py on the rows in tmp_path/rows fails with that hint."""
    folder = tmp_path / "rows"

    def call(hint):
        message = main(
            train, "config/nano.py", f"--data={folder}", f"--out_dir={tmp_path}/run")
        assert re.search(hint, message), message
    return call


def write_good_rows(folder, vocab_size=512):
    rows = [([1, 2, 3], [0, 1, 1])] * 4
    meta = {"vocab_size": vocab_size, "tokenizer": tokenizer_fingerprint(NANO_TARGET)}
    write_samples(str(folder), {"train": rows, "val": rows}, meta)


def test_broken_rows_of_another_vocabulary(training_fails, tmp_path):
    write_good_rows(tmp_path / "rows", vocab_size=600)
    training_fails("vocab_size 600, this target .* 512")


def test_broken_rows_cut_off(training_fails, tmp_path):
    write_good_rows(tmp_path / "rows")
    for size in (13, 12):  # in the middle of a number, and between two
        os.truncate(tmp_path / "rows" / "train.tokens.bin", size)
        training_fails("(cannot read the train rows|3 tokens).*(prepare|conversations).py")


def test_broken_rows_unfinished(training_fails, tmp_path):
    write_good_rows(tmp_path / "rows")
    (tmp_path / "rows" / "meta.json").unlink()
    training_fails("no finished data: run python")


def test_broken_rows_with_a_torn_meta(training_fails, tmp_path):
    write_good_rows(tmp_path / "rows")
    cut_off(tmp_path / "rows" / "meta.json", 9)
    training_fails("meta.json is broken")


def test_broken_key_in_a_config_file(main, tmp_path):
    (tmp_path / "x.py").write_text("lrr = 1")
    assert "x.py: unknown key 'lrr'" in main(train, str(tmp_path / "x.py"))


def test_broken_checkpoint_to_go_on_from(main, small_run, tmp_path):
    config, _ = small_run
    config_file = write_config(tmp_path / "small.py", config)
    folder = tmp_path / "run-dflash" / "step-000001"
    folder.mkdir(parents=True)
    message = main(train, str(config_file), "--resume")
    assert "no training_state.pt" in message
    (folder / "training_state.pt").write_text(json.dumps({}))
    message = main(train, str(config_file), "--resume")
    assert "cannot read" in message
