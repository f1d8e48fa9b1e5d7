"""
Command lines: a user's mistake ends in one line that says what is wrong, and status 1.

All these tests catch a traceback or, worse, success: a script that runs for an hour on a broken
file, or with a default. The `main` fixture asserts that a failure is one line.
"""
import os
import re
from types import SimpleNamespace

import pytest
import torch

import fast.decoding

import draft_decode
import train
from data import conversations, regenerate
from data.math500 import prepare as math500
from data.samples import write_samples
from draft_decode import Generation, RoundOutput, summary
from fast import cpu
from model import DFlashDraftModel
from sampling import Sampling
from target import Target
from tests.common import NANO_TARGET, edit_json, nano, nano_copy, questions
from tokenizer import chat_prompt, tokenizer_fingerprint

# ------------------------------------------------------------------------------------------------
# decoding

DECODE = ("--device=cpu", "--dtype=float32", "--prompt=What is 3 * 14?", "--max_new_tokens=12")


def test_cli_decodes_and_compares(main):
    """Failure 15: a speedup is reported without comparing outputs."""
    out = main(draft_decode, *DECODE)
    assert "12 tokens | " in out
    assert "speedup" in out
    assert out.rstrip().endswith("identical")


def generation(tokens, lengths, seconds):
    """A finished generation of the given tokens, in rounds of the given lengths."""
    rounds = []
    first = 1  # the prompt's own token is in no round
    for length in lengths:
        rounds.append(RoundOutput(tokens[first:first + length], length - 1))
        first += length
    return Generation(tokens, rounds, seconds)


def test_cli_keys_arrive_where_tokens_are_chosen(main, monkeypatch):
    """A sampling key, a limit, a dtype or thinking is ignored: with and without the comparison,
    and with --raw."""
    requests = []
    compiled = []

    def keep(target, drafter, prompt_ids, *, max_new_tokens, stop_token_ids, tokens_per_forward,
             sampling, decoders):
        requests.append((prompt_ids, tokens_per_forward))
        assert max_new_tokens == 9
        assert stop_token_ids == {502, 504}
        assert sampling == Sampling(0.7, top_k=5, top_p=0.9, seed=3, draft_temperature=0.5)
        assert target.embed_tokens.weight.dtype == torch.bfloat16
        if drafter is not None:
            assert drafter.fc.weight.dtype == torch.bfloat16
        return iter([RoundOutput([1]), RoundOutput([2, 3], 1)])

    def keep_compile(target, drafter):
        compiled.append((target, drafter))

    monkeypatch.setattr(draft_decode, "generate", keep)
    monkeypatch.setattr(fast.decoding, "compile_for_decoding", keep_compile)
    flags = (
        "--prompt=Hi", "--device=cpu", "--dtype=bfloat16", "--max_new_tokens=9", "--top_k=5",
        "--temperature=0.7", "--top_p=0.9", "--seed=3", "--draft_temperature=0.5")
    _, tokenizer = nano()
    plain = chat_prompt(tokenizer, "Hi")

    main(draft_decode, *flags)
    # the warm-up of both, then the drafter, and the target alone in both shapes
    assert requests == [(plain, None), (plain, 1), (plain, None), (plain, 16), (plain, 1)]
    assert not compiled
    main(draft_decode, *flags, "--compare=False", "--thinking", "--compile")
    assert requests[5:] == [(chat_prompt(tokenizer, "Hi", thinking=True), None)]
    (target, drafter), = compiled
    assert isinstance(target, Target) and isinstance(drafter, DFlashDraftModel)
    main(draft_decode, *flags, "--compare=False", "--raw")
    assert requests[6:] == [(tokenizer.encode("Hi"), None)]


@pytest.mark.parametrize("variable, largest, threads_used", (
    (None, cpu.SMALL, 1), (None, 1000, 2), ("2", cpu.SMALL, 2)))
def test_cli_decodes_a_small_target_with_one_thread(
        main, monkeypatch, variable, largest, threads_used):
    """Next to other busy processes two threads wait for each other: 22 tokens/s instead of 280. A
    large target, or a user who chose the number, is left alone."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if variable is not None:
        monkeypatch.setenv("OMP_NUM_THREADS", variable)
    monkeypatch.setattr(cpu, "SMALL", largest)
    torch.set_num_threads(2)
    main(draft_decode, *DECODE, "--compare=False")
    assert torch.get_num_threads() == threads_used


def test_cli_prints_guesses_and_choices_in_their_colors(capsys):
    """A guess is printed like the target's own token; half of a character is printed, or lost; an
    escape sequence in the answer reaches the terminal; old tokens are decoded again."""
    texts = {(): "", (1,): "\x1b", (2,): "b", (3,): "\ufffd", (3, 4): "é"}  # of new tokens only

    def decode(tokens, skip_special_tokens):
        assert skip_special_tokens
        return texts[tuple(tokens)]

    printer = draft_decode.Printer(SimpleNamespace(decode=decode), color=True)
    printer([1], RoundOutput([1], 0))
    printer([1, 2, 3], RoundOutput([2, 3], 1))    # one guess was right; the second token is half
    printer([1, 2, 3, 4], RoundOutput([4], 0))
    own, guess, end = "\033[34m", "\033[32m", "\033[0m"  # blue, green, plain
    assert capsys.readouterr().out == rf"{own}\x1b{end}{guess}b{end}{own}é{end}"


def test_cli_summary_by_hand():
    """Failure 15: a rate counts the prompt's own token, which is in no round; the speedup is over
    the slower way to run the target alone; outputs that differ are called identical."""
    tokens = list(range(11))
    ours = generation(tokens, [6, 4], seconds=1.0)
    same_shape = generation(tokens, [1] * 10, seconds=10.0)
    one_token = generation(tokens, [1] * 10, seconds=5.0)
    line = summary(ours, same_shape, one_token)
    assert line.startswith("11 tokens | 2 rounds | tau 5.00 | 10 tokens/s")
    assert "without drafter (1-token forwards): 2 tokens/s | speedup 5.00x" in line
    assert line.endswith("identical")
    assert summary(ours, None, None) == "11 tokens | 2 rounds | tau 5.00 | 10 tokens/s"

    other = generation(tokens[:7] + [99] + tokens[8:], [1] * 10, seconds=10.0)
    assert summary(ours, other, one_token).endswith("first difference at token 7")


def test_cli_ctrl_c_ends_the_comparison_only(main, monkeypatch):
    """Ctrl-C while the target alone runs, which takes minutes, loses the answer's own figures."""
    real = draft_decode.generate
    started = []

    def interrupted(target, drafter, *args, **options):
        started.append(drafter)
        if len(started) == 4:  # after both warm-ups and the answer
            raise KeyboardInterrupt
        return real(target, drafter, *args, **options)

    monkeypatch.setattr(draft_decode, "generate", interrupted)
    last_line = main(draft_decode, *DECODE, f"--prompt={questions()[0]}").splitlines()[-1]
    assert "tau" in last_line
    assert len(started) == 4
    assert "target alone" not in last_line


@pytest.mark.parametrize("flags, hint", (
    (["--prompt= "], "error: the prompt is empty"),
    (["--prompt=\udcff"], "error: the prompt is no.* valid UTF-8"),
    (["--prompt=" + "7 " * 600], r"error: prompt too long: 1\d\d\d tokens, .*context of 1024"),
    (["--target=nowhere"], "error: no .* in 'nowhere'"),
    (["--target=Qwen/Qwen3.5-0.8B"], "error: .*hub does not give it.*folder"),
    (["--target=random:27b"], "error: .*no tokenizer"),
    (["--drafter=nowhere"], "error: no drafter in 'nowhere'.*train.py"),
    (["--dtype=float16"], "error: dtype = 'float16'"),
    (["--max_new_tokens=0"], "error: max_new_tokens = 0"),
    (["--top_p=0", "--target=nowhere"], "error: top_p = 0.0: use 1e-09 to 1"),
    (["--draft_temperature=nan", "--target=nowhere"], "error: draft_temperature = nan: use 0.0 to"),
    (["--promt=x"], "command line: unknown key 'promt', did you mean 'prompt'"),
))
def test_cli_decoding_mistakes(main, flags, hint):
    assert re.match(hint, main(draft_decode, *DECODE, *flags))


@pytest.mark.parametrize("flag", (
    "--target={}", "--drafter={}", "--device={}", "--device=cpu:{}", "--dtype={}", "--{}=1",
    "--seed={}", "{}", "{}.py", "--data={}", "--out_dir=" + __file__ + "/{}", "--weighting={}"))
def test_cli_escapes_what_comes_from_outside(main, capsys, tmp_path, flag):
    """The name of a folder or a value clears the screen, or hides the error."""
    script = train
    words = ["config/nano.py", "--device=cpu", f"--out_dir={tmp_path}", flag.format("\x1b[2J")]
    if flag == "--drafter={}":
        script = draft_decode
        words = [*DECODE, *words[-1:]]
    line = main(script, *words)
    assert r"\x1b[2J" in line
    assert line.isprintable() and len(line) < 200
    assert "\x1b" not in "".join(capsys.readouterr())

# ------------------------------------------------------------------------------------------------
# broken folders


def break_file(path, change):
    """Delete a file (None), cut it off (int), replace all of it (str) or one text in it (tuple), or
    edit keys of its JSON (dict)."""
    if change is None:
        path.unlink()
    elif isinstance(change, int):
        os.truncate(path, change)
    elif isinstance(change, str):
        path.write_text(change)
    elif isinstance(change, tuple):
        assert change[0] in path.read_text()
        path.write_text(path.read_text().replace(*change))
    else:
        edit_json(path, **change)


WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
BROKEN_FOLDERS = (
    ("target", WEIGHTS, 99_999, "cannot load .*model.safetensors"),
    ("target", INDEX, "[]", "cannot load .*index.json"),
    ("target", "config.json", "{", "cannot use .*config.json"),
    ("target", "config.json", {"num_experts": 8}, "cannot use .*mixture-of-experts"),
    ("target", "config.json", {"intermediate_size": 400}, r"_proj.weight is .384, 128., not .40"),
    ("target", "tokenizer.json", None, "no tokenizer.json in"),
    ("target", "tokenizer.json", "{", "no tokenizer in"),
    ("target", "tokenizer.json", ('"?": 30,', '"?": 987,'), "vocabulary of 512"),
    ("target", "chat_template.jinja", None, "no chat template: .*--raw"),
    ("drafter-dflash", WEIGHTS, 999, "cannot load .*model.safetensors"),
    ("drafter-dflash", "config.json", "{", "config.json is not that of a drafter"),
)


@pytest.mark.parametrize("part, file, change, hint", BROKEN_FOLDERS)
def test_cli_broken_folders(main, tmp_path, part, file, change, hint):
    folder = nano_copy(tmp_path / "copy-dflash", part)
    break_file(folder / file, change)
    flag = f"--{part.removesuffix('-dflash')}={folder}"
    assert re.search(hint, main(draft_decode, *DECODE, flag))


# ------------------------------------------------------------------------------------------------
# preparing data

QUESTION = '{"messages": [{"role": "user", "content": "q"}]}\n'
CHAT = '{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}\n'


@pytest.mark.parametrize("name, content, flag, hint", (
    ("x.jsonl", CHAT * 3, "--source=no/rows", "no file 'no/rows'"),
    ("x.jsonl", CHAT * 3, "--out_dir={source}/rows", "Not a directory"),
    ("x.jsonl", "", None, "holds no rows"),
    ("x.jsonl", QUESTION * 3, None, "line 1: no assistant's answer. 3 of 3 rows"),
    ("x.jsonl", CHAT + '{"messages": [', None, "0 rows to train on and 1 to hold out.*not JSON"),
    ("x.parquet", CHAT, None, "cannot read .*parquet"),
))
def test_cli_preparing_mistakes(main, tmp_path, name, content, flag, hint):
    """Also: rows of a failed run look finished."""
    source = tmp_path / name
    source.write_text(content, errors="surrogateescape")
    flags = [f"--target={NANO_TARGET}", f"--source={source}", f"--out_dir={tmp_path}/rows"]
    if flag is not None:
        flags.append(flag.format(source=source))
    assert re.search(hint, main(conversations, *flags, "--num_proc=1"))
    assert not (tmp_path / "rows" / "meta.json").exists()


@pytest.mark.parametrize("script, flags, hint", (
    (regenerate, ["--prompts={source}"], "x.jsonl, line 1: no conversation"),
    (regenerate, [], "give --prompts and --out"),
    (math500, ["--source={source}"], "x.jsonl, line 1: no text"),
))
def test_cli_mistakes_in_questions(main, tmp_path, script, flags, hint):
    (tmp_path / "x.jsonl").write_text('{"id": "1"}\n')
    flags = [flag.format(source=tmp_path / "x.jsonl") for flag in flags]
    assert hint in main(script, *flags, f"--out={tmp_path}/y")

# ------------------------------------------------------------------------------------------------
# training


@pytest.mark.parametrize("file, change, hint", (
    ("train.tokens.bin", 13, "cannot read the train rows.*(prepare|conversations).py"),
    ("meta.json", None, "no finished data: run python"),
    ("meta.json", 9, "meta.json is broken"),
))
def test_cli_broken_rows(main, tmp_path, file, change, hint):
    rows = [([1, 2, 3], [0, 1, 1])] * 4
    meta = {"vocab_size": 512, "tokenizer": tokenizer_fingerprint(NANO_TARGET)}
    write_samples(str(tmp_path / "rows"), {"train": rows, "val": rows}, meta)
    break_file(tmp_path / "rows" / file, change)
    flags = [f"--data={tmp_path}/rows", f"--out_dir={tmp_path}/run"]
    assert re.search(hint, main(train, "config/nano.py", *flags))
