"""
Command lines: a user's mistake ends in one line that says what is wrong, and status 1.

All these tests catch a traceback or, worse, success: a script that runs for an hour on a broken
file, or with a default. The `main` fixture asserts that a failure is one line.
"""
import os
import re
from types import SimpleNamespace

import pytest

import draft_decode
import train
from configurator import script_keys
from data import conversations, regenerate
from data.math500 import prepare as math500
from data.samples import write_samples
from draft_decode import Generation, RoundOutput, summary
from sampling import Sampling
from tests.common import NANO_TARGET, edit_json, nano_copy
from tokenizer import tokenizer_fingerprint

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


def observed(main, monkeypatch, *flags):
    """What draft_decode.py hands to other functions when it runs with these flags."""
    seen = {"runs": []}
    target = SimpleNamespace(name="target", config=None)
    drafter = SimpleNamespace(name="drafter", block_size=8)
    tokenizer = SimpleNamespace(encode=lambda text: ("raw", text))

    def load(model, name, place):
        seen[model.name] = name
        seen.setdefault("places", []).append(place)
        return model

    def prepare(*models, compile):
        assert models == (target, drafter)
        seen["compile"] = compile

    def decode(target, drafter, prompt_ids, *, max_new_tokens, stop_token_ids, tokens_per_forward,
               sampling, decoders):
        seen["runs"].append((drafter, tokens_per_forward))
        seen["choice"] = (prompt_ids, max_new_tokens, stop_token_ids, sampling)
        return iter([RoundOutput([1]), RoundOutput([2, 3], 1)])

    class Quiet(draft_decode.Printer):
        def __call__(self, tokens, output):
            seen["color"] = self.color

    for name, stub in (
            ("load_tokenizer", lambda name: seen.update(tokenizer=name) or tokenizer),
            ("load_target", lambda name, *place: load(target, name, place)),
            ("load_drafter", lambda name, config, *place: load(drafter, name, place)),
            ("chat_prompt", lambda tokenizer, text, thinking: (text, thinking)),
            ("stop_ids", lambda tokenizer: {7}),
            ("generate", decode),
            ("Printer", Quiet)):
        monkeypatch.setattr(draft_decode, name, stub)
    monkeypatch.setattr(draft_decode.fast, "prepare_for_decoding", prepare)
    main(draft_decode, "--prompt=Hello", *flags)
    seen["runs"] = [(guesser and guesser.name, count) for guesser, count in seen["runs"]]
    return seen


def choice(prompt_ids=("Hello", False), max_new_tokens=2048, **sampling):
    return {"choice": (prompt_ids, max_new_tokens, {7}, Sampling(**sampling))}


KEYS = {  # a value for each key, and what it changes
    "prompt": ("Hi", choice(("Hi", False))),
    "target": ("x", {"target": "x", "tokenizer": "x"}),
    "drafter": ("x", {"drafter": "x"}),
    "temperature": (0.7, choice(temperature=0.7)),
    "top_k": (5, choice(top_k=5)),
    "top_p": (0.9, choice(top_p=0.9)),
    "seed": (3, choice(seed=3)),
    "draft_temperature": (0.5, choice(draft_temperature=0.5)),
    "raw": (True, choice(("raw", "Hello"))),
    "thinking": (True, choice(("Hello", True))),
    "max_new_tokens": (9, choice(max_new_tokens=9)),
    "device": ("cuda", {"places": [("cuda", draft_decode.dtype)] * 2}),
    "dtype": ("bfloat16", {"places": [(draft_decode.device, "bfloat16")] * 2}),
    "compile": (True, {"compile": True}),
    "compare": (False, {"runs": [("drafter", None)]}),
    "color": (True, {"color": True}),
}


@pytest.mark.parametrize("key", script_keys(vars(draft_decode))[0])
def test_cli_keys_arrive_and_change_nothing_else(main, monkeypatch, key):
    """A key is ignored, or arrives in one of two models or runs only. A new key must join KEYS."""
    value, changes = KEYS[key]
    defaults = observed(main, monkeypatch)
    # the warm-up of both, then the drafter, and the target alone in both shapes
    assert defaults["runs"] == [
        ("drafter", None), (None, 1), ("drafter", None), (None, 8), (None, 1)]
    assert defaults["choice"] == choice()["choice"]
    assert observed(main, monkeypatch, f"--{key}={value}") == defaults | changes


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

    for other in (tokens[:7] + [99] + tokens[8:], tokens[:7]):  # also where one ends
        line = summary(ours, generation(other, [1], seconds=10.0), one_token)
        assert line.endswith("first difference at token 7")


def test_cli_ctrl_c_ends_the_comparison_only(main, monkeypatch):
    """Ctrl-C while the target alone runs, which takes minutes, loses the answer's own figures."""
    def interrupted(name, token_count):
        raise KeyboardInterrupt

    monkeypatch.setattr(draft_decode, "bar", interrupted)
    last_line = main(draft_decode, *DECODE).splitlines()[-1]
    assert "tau" in last_line
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
    line = main(draft_decode, *DECODE, *flags)
    assert re.match(hint, line)
    assert len(line) < 200


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
NO_TEXT = '{"id": "1"}\n'


@pytest.mark.parametrize("script, name, content, flags, hint", (
    (conversations, "x.jsonl", CHAT, ["--source=no/rows"], "no file 'no/rows'"),
    (conversations, "x.jsonl", CHAT, ["--out_dir={source}/rows"], "Not a directory"),
    (conversations, "x.jsonl", "", [], "holds no rows"),
    (conversations, "x.jsonl", QUESTION * 3, [], "line 1: no assistant's answer. 3 of 3 rows"),
    (conversations, "x.jsonl", CHAT + "[", [], "0 rows to train on and 1 to hold out"),
    (conversations, "x.parquet", CHAT, [], "cannot read .*parquet"),
    (regenerate, "x.jsonl", NO_TEXT, ["--prompts={source}"], "x.jsonl, line 1: no conversation"),
    (regenerate, "x.jsonl", NO_TEXT, [], "give --prompts and --out"),
    (math500, "x.jsonl", NO_TEXT, ["--source={source}"], "x.jsonl, line 1: no text"),
))
def test_cli_preparing_mistakes(main, tmp_path, script, name, content, flags, hint):
    """Also: rows of a failed run look finished."""
    source = tmp_path / name
    source.write_text(content)
    if script is conversations:
        flags = [f"--target={NANO_TARGET}", "--source={source}", f"--out_dir={tmp_path}/rows",
                 "--num_proc=1", *flags]
    else:
        flags = [f"--out={tmp_path}/y", *flags]
    assert re.search(hint, main(script, *[flag.format(source=source) for flag in flags]))
    assert not (tmp_path / "rows" / "meta.json").exists()

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
