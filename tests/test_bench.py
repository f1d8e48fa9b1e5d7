"""bench.py: a benchmark that flatters (failure 15) or miscounts."""
import itertools
import json
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import bench
import fast.decoding
from benchmarks import common, drafters, exactness, speedup
from benchmarks.common import decode_in_turns, summarize
from benchmarks.prompts import (Prompt, fraction_correct, is_correct, load_questions,
                                random_prompts)
from tokenizer import chat_prompt, stop_ids
from configurator import configure
from draft_decode import Generation, RoundOutput, generate
from decode_state import DecodeState, prefill
from model import DFlashDraftModel
from sampling import Sampling
from tests.common import (K, ROOT, V, nano, read_jsonl, shipped, small_target, tokens_of,
                          write_jsonl)

SAMPLING = Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3, draft_temperature=0.5)
FLAGS = ("--limit=2", "--max_new_tokens=7", "--top_k=5", "--top_p=0.9", "--seed=3",
         "--draft_temperature=0.5", "--dtype=bfloat16")


@pytest.mark.parametrize("command, temperature, temperatures", (
    ("acceptance", 0.7, 0.1), ("speedup", 0.7, 0.1), ("exactness", 0.1, 0.7)))
def test_bench_keys_arrive_where_tokens_are_chosen(
        run_bench, monkeypatch, tmp_path, command, temperature, temperatures):
    """A sampling key, a limit, or a dtype has no effect. The report looks the same, but it is about
    a different run."""
    requests = []
    probabilities = []  # of oracles

    def keep(target, drafter, prompts, *, max_new_tokens, stop_token_ids, sampling, **others):
        dtypes = {target.embed_tokens.weight.dtype}
        if isinstance(drafter, DFlashDraftModel):
            dtypes.add(drafter.fc.weight.dtype)
        for index in range(len(prompts)):
            requests.append((max_new_tokens, stop_token_ids, sampling, dtypes))
            yield index, RoundOutput([1])
            yield index, RoundOutput([2], 0, [0] * (K - 1))

    def learn(self, prompt_ids, answer, p, number=0):
        probabilities.append(p)

    monkeypatch.setattr(common, "generate_many", keep)
    monkeypatch.setattr(drafters.Oracle, "learn", learn)
    run_bench(command, *FLAGS, f"--temperature={temperature}", f"--temperatures={temperatures},")
    for request in requests:
        assert request == (7, stop_ids(nano()[1]), SAMPLING, {torch.bfloat16})
    if command == "speedup":  # a warm-up of three modes, then each three times per prompt
        assert len(requests) == 3 + 2 * 3 * 3
    if command == "exactness":  # two prompts
        assert sorted(probabilities) == [0.0] * 2 + [0.8] * 2
    setup = json.loads((tmp_path / f"{command}.json").read_text())["setup"]
    assert (setup["limit"], setup["top_p"], setup["seed"]) == (2, 0.9, 3)
    assert setup["command"].startswith(f"python bench.py {command} --limit=2 ")
    assert re.match("[0-9a-f]{40}", setup["commit"] or 40 * "0")  # None: not a git repository
    assert setup["date"] and setup["machine"] and setup["versions"]["torch"] == torch.__version__


def test_bench_loads_by_its_keys(monkeypatch):
    """thinking or compile has no effect, compile is the default, or the limit is ignored."""
    monkeypatch.chdir(ROOT)
    compiled = []
    monkeypatch.setattr(
        fast.decoding, "compile_for_decoding",
        lambda target, drafter: compiled.extend(["target", "drafter"]))
    _, tokenizer = nano()
    question, _ = load_questions("nano", 1)[0]
    for thinking, flags in ((False, ()), (True, ("--thinking", "--compile", "--limit=2"))):
        workload = common.load(configure(vars(bench), flags), 3)
        assert workload.prompts[0].ids == chat_prompt(tokenizer, question, thinking)
        assert len(workload.prompts) == 3 - thinking
        assert compiled == ["target", "drafter"] * thinking
    with pytest.raises(ValueError, match="device = 'tpu'"):
        common.load(configure(vars(bench), ("--device=tpu",)), 1)


KEYS = {  # the test that fails if a key has no effect; a new key must join
    "keys_arrive_where_tokens_are_chosen":
        "limit max_new_tokens temperature temperatures top_k top_p seed draft_temperature dtype "
        "out_dir",
    "loads_by_its_keys": "target device thinking compile",
    "figures_follow_from_the_rounds": "drafter slots",
    "measures_on_training_rows": "prompts",
    "scaling_compares_modes_with_the_same_samples": "processes steps",
    "scaling_reads_the_log_of_train_py": "recipe mixed",
    "throughput": "assumed_tau",
    "serve": "base_url baseline_url concurrency",
    "bugs_are_measured": "only"}


def test_bench_every_key_names_its_test():
    """A key is added without a test, or the test of a key is deleted."""
    keys = " ".join(KEYS.values()).split()
    assert sorted(keys) == sorted(vars(configure(vars(bench), [])))
    sources = [path.read_text() for path in Path(ROOT, "tests").glob("test_*.py")]
    for name in KEYS:
        assert any(re.search(f"^def test_(bench_)?{name}\\(", text, re.M) for text in sources), name


@pytest.mark.parametrize("command, slots, limit", (("acceptance", 2, 2), ("speedup", 1, 1)))
def test_bench_figures_follow_from_the_rounds(run_bench, tmp_path, command, slots, limit):
    """Failure 15: a command or a number of slots gives different rounds; --slots has no effect."""
    report = run_bench(command, f"--limit={limit}", "--max_new_tokens=30", f"--slots={slots}")
    target, tokenizer = nano()
    of_prompts = []
    for question, _ in load_questions("nano", limit):
        ids = chat_prompt(tokenizer, question)
        _, *rounds = generate(
            target, shipped(), ids, max_new_tokens=30, stop_token_ids=stop_ids(tokenizer))
        of_prompts.append([[one_round.accepted, one_round.tokens] for one_round in rounds])
    rows = read_jsonl(tmp_path / f"{command}.jsonl")
    assert [row["speculative"]["rounds"] for row in rows] == of_prompts

    figures = common.round_figures(of_prompts, K)
    assert report | figures == report
    assert report["tau_micro"] > 4
    assert (report["command"], report["slots"], report["prompts"]) == (command, slots, limit)
    assert report["identical"] == 1
    if command == "acceptance":  # the first output is of the prefill, in no round
        assert len(report["transcript"]["rounds"]) in [len(rounds) for rounds in of_prompts]
        assert (tmp_path / "acceptance.png").stat().st_size > 1000
    for mode in ("speculative", "target"):
        assert len(rows[0][mode]["repeats"]) == (3 if command == "speedup" else 1)


def test_bench_tau_by_hand():
    """Failure 15: the fraction of a slot counts tokens instead of guesses, or an answer without a
    round counts."""
    def rounds(*pairs):
        return [[accepted, [5] * length] for accepted, length in pairs]

    # A limit ends the first answer after 3 of 4 tokens. A stop ends the second after 2 guesses.
    figures = common.round_figures([
        rounds((3, 4), (3, 4), (3, 4), (3, 4), (3, 3)), rounds((3, 4), (3, 4), (2, 2)),
        rounds((15, 16), (15, 16)), []], K)
    assert figures["tau_micro"] == (19 + 10 + 32) / (5 + 3 + 2) == 6.1
    assert figures["tau_macro"] == pytest.approx((19 / 5 + 10 / 3 + 16) / 3)
    assert figures["accepted_up_to_position"] == [1.0, 1.0, 0.9] + [0.2] * 12
    assert figures["rounds_of_length"] == [0, 1, 1, 6] + [0] * 11 + [2]


def row_of(tokens, seconds):
    """A row of decode_in_turns(). tokens and seconds: {mode: those of its answer}."""
    row = {"answer": None}
    for mode in tokens:
        rounds = [[1, tokens[mode][1:]]] if len(tokens[mode]) > 1 else []
        row[mode] = {"tokens": tokens[mode], "rounds": rounds, "seconds": seconds[mode]}
    return row


def test_bench_speeds_by_hand():
    """Failure 15: tokens/s count the prefill's token, a speedup is over the slow mode, outputs are
    compared or graded as those of the wrong mode, or answers that nobody can grade count."""
    rows = []
    for target_tokens, target_seconds in (([7, 8, 8], 2.0), ([7, 8, 9], 6.0)):
        rows.append(row_of(
            {"speculative": [7, 8, 9], "target": target_tokens, "target_same_shape": [7, 8, 9]},
            {"speculative": 1.0, "target": target_seconds, "target_same_shape": 8.0}))
    unknown = summarize(rows, None, K)  # a target with random weights has no tokenizer
    assert unknown["accuracy"] == {"target": None, "speculative": None}
    rows[1]["answer"] = "9"
    text_of_last = SimpleNamespace(decode=lambda tokens, **options: f"\\boxed{{{tokens[-1]}}}")
    report = summarize(rows, text_of_last, K)
    assert report["tokens_per_s"] == {
        "speculative": 4 / 2, "target": 4 / 8, "target_same_shape": 4 / 16}
    assert (report["speedup"], report["identical"], report["identical_to_steps"]) == (4, 1, 0.5)
    rows[0]["answer"] = "8"
    assert summarize(rows, text_of_last, K)["accuracy"] == {"target": 1, "speculative": 0.5}
    assert report["accuracy"] == {"target": 1, "speculative": 1}


def test_bench_gains_by_hand():
    """A prompt as fast as the target alone counts as faster, the mean is arithmetic, or an answer
    without a round is in the figures."""
    rows = []
    for count, seconds in ((5, 1.0), (5, 2.0), (5, 4.0), (5, 1.0), (1, 1.0)):
        tokens = [0] * count
        rows.append(row_of({"speculative": tokens, "target": tokens},
                           {"speculative": seconds, "target": 2.0}))
    assert speedup.gains_of(rows) == {"faster": 2, "timed": 4, "min": 0.5, "median": 1.5,
                                      "max": 2.0, "geomean": pytest.approx(2 ** 0.25)}
    assert [row["speedup"] for row in rows] == [2.0, 1.0, 0.5, 2.0, None]
    with pytest.raises(ValueError, match="every answer ended with its first token"):
        speedup.gains_of(rows[4:])


def test_bench_modes_take_turns():
    """One mode always has the warmer machine or pays for its warm-up; a repeat is missing, or the
    fastest counts instead of the median; with several slots, a prompt is decoded twice or never."""
    calls = []
    seconds = (3.0, 1.0, 2.0, 4.0, 5.0)

    def mode(name):
        def decode(prompts):
            calls.append((name, *[prompt[0] for prompt in prompts]))
            return [Generation([prompt[0]], [], seconds[len(calls) % 5]) for prompt in prompts]
        return decode

    prompts = [Prompt([number]) for number in range(10, 30)]
    rows = decode_in_turns({"a": mode("a"), "b": mode("b")}, prompts[:2], repeats=3)
    assert calls == [
        ("a", 10), ("b", 10),  # the warm-up
        ("b", 10), ("a", 10), ("a", 10), ("b", 10), ("b", 10), ("a", 10),
        ("a", 11), ("b", 11), ("b", 11), ("a", 11), ("a", 11), ("b", 11)]
    assert (rows[0]["a"]["repeats"], rows[0]["a"]["seconds"]) == ([5.0, 3.0, 4.0], 4.0)

    calls.clear()
    rows = decode_in_turns({"a": mode("a")}, prompts, slots=2)
    assert calls[1:] == [("a", *range(10, 26)), ("a", *range(26, 30))]
    assert [row["prompt"] for row in rows] == list(range(20))
    assert [row["a"]["tokens"] for row in rows] == [[number] for number in range(10, 30)]


def test_bench_mistakes_are_one_line(run_bench, main, monkeypatch, tmp_path):
    """Ctrl-C prints a traceback or leaves half of a result; only one of several slots is used;
    hours of measuring before out_dir turns out to be a file; a perfect score for NaN; an escape
    sequence from a file or a server reaches the terminal with an error."""
    def interrupt(*args, **options):
        raise KeyboardInterrupt

    def fail(config):
        raise ValueError("\x1b[2J\n" + "x" * 500)

    monkeypatch.setattr(speedup, "run", fail)
    message = main(bench, "speedup", f"--out_dir={tmp_path}")
    assert "\x1b" not in message and len(message) < 200
    with pytest.raises(SystemExit, match="give one number of sequences"):
        run_bench("acceptance", "--slots=1,2")
    output = RoundOutput([1])
    output.is_finite = False  # logits of NaN: all modes choose token 0, so all are identical
    monkeypatch.setattr(common, "generate_many", lambda *args, **options: [(0, output)])
    with pytest.raises(SystemExit, match="in .data/nano/target. gives logits that are not"):
        run_bench("acceptance")
    monkeypatch.setattr(common, "generate_many", interrupt)
    with pytest.raises(SystemExit, match="^interrupted: nothing was written"):
        run_bench("acceptance")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").touch()
    for out_dir in (tmp_path / "file", tmp_path / "file" / "x", "/proc"):  # /proc: read-only
        message = main(bench, "figures", f"--out_dir={out_dir}")
        assert message.startswith("error: cannot write to out_dir = ")
        assert len(message) < 200


@pytest.mark.parametrize("flag", (
    "limit=-1", "max_new_tokens=0", "slots=4,0", "temperature=nan", "temperatures=0,-1",
    "temperatures=", "top_p=0", "top_k=-1", "assumed_tau=0.5", "processes=0,2", "processes=",
    "steps=2", "concurrency=0"))
def test_bench_refuses_nonsense_values(main, monkeypatch, tmp_path, flag):
    """A key without a meaning runs, prints a traceback, or is reported after the measurement."""
    monkeypatch.setattr(speedup, "run", None)  # is not called
    message = main(bench, "speedup", f"--{flag}", f"--out_dir={tmp_path}")
    key = flag.partition("=")[0]
    assert re.match(f"error: {key} (= .*: use .* to |is empty)", message), message
    assert len(message) < 200


def test_bench_differing_output_is_an_error(run_bench, monkeypatch):
    """Status 0 for outputs that differ from the target's own, or status 1 for rounding."""
    for identical in (0.9, 1):
        report = {"identical": identical, "identical_to_steps": 0.5}
        monkeypatch.setattr(speedup, "run", lambda config: report)
        assert run_bench("speedup", differs=identical < 1) == {"command": "speedup"} | report


SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


@pytest.mark.parametrize("name, row, question, answer", (
    ("math500", {"problem": "1+1?", "answer": "2"}, "1+1?" + SUFFIX, "2"),
    ("gsm8k", {"question": "1+1?", "answer": "so\n#### 1,002"}, "1+1?" + SUFFIX, "1002"),
    ("humaneval", {"prompt": "def f():"}, "Write a solution to the following problem and make sure "
     "that it passes the tests:\n```python\ndef f():\n```", None)))
def test_bench_prompts_by_name(tmp_path, name, row, question, answer):
    """Questions differ from those of published figures, or a file of something else is read."""
    path = write_jsonl(tmp_path / "x.jsonl", [row, {}])
    assert load_questions(f"{name}:{path}", 1) == [(question, answer)]
    for source, hint in (
            (f"{name}:{path}", f"row 2 does not look like {name}"),
            (f"{name}:nowhere", "no file"),
            (name, "hub does not give"),
            ("mbpp", "one of nano, plain, refusals, math500, gsm8k, humaneval")):
        with pytest.raises(ValueError, match=hint):
            load_questions(source, 9)


def test_bench_random_prompts_by_hand():
    """Lengths do not reach the longest, or ids are outside the vocabulary."""
    prompts = random_prompts("random:64:256", 3, 10)
    assert [len(prompt.ids) for prompt in prompts] == [64, 128, 256]
    assert [len(prompt.ids) for prompt in random_prompts("random:64:256", 1, 10)] == [64]
    assert set(prompts[2].ids) == set(range(10))
    assert random_prompts("random:64:256", 3, 10) == prompts
    with pytest.raises(ValueError, match="write random:SHORTEST:LONGEST"):
        random_prompts("random:64", 3, 10)


def test_bench_limit_of_a_file(tmp_path):
    """There is a prompt more or less than the limit, an empty line is a prompt, or a row without a
    question is left out silently."""
    rows = [{"question": str(number)} for number in range(4)]
    path = write_jsonl(tmp_path / "x.jsonl", [rows[0], "", *rows[1:]])
    for limit in (1, 4, 9):
        questions = load_questions(str(path), limit)
        assert [question for question, _ in questions] == ["0", "1", "2", "3"][:limit]
    write_jsonl(path, [{"text": "1"}, {"text": "2"}, rows[0]])
    with pytest.raises(ValueError, match="x.jsonl, line 1: no conversation; keys: .*. 2 of 3 rows"):
        load_questions(str(path), 9)


@pytest.mark.parametrize("text, answer, verdict", (
    ("\\boxed{ x^2 }", "x^2", True),
    ("\\boxed{007}", "7", True),
    ("\\boxed{8}", "7", False),
    ("no box", "7", False),
    ("\\boxed{16/3}", "16/3", True),
    ("\\boxed{32/6}", "16/3", True),
    ("\\boxed{5}", "16/3", False),
    ("\\boxed{14 remainder 2}", "14 remainder 2", True),
    ("\\boxed{14}", "14 remainder 2", False),
    ("\\boxed{0.5}", "\\frac{1}{2}", None)))
def test_bench_answers_without_math_verify(monkeypatch, text, answer, verdict):
    """A right answer counts as wrong because the package is missing."""
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it fails
    assert is_correct(text, answer) is verdict


def test_bench_fraction_of_right_answers(monkeypatch, capsys):
    """The verdict of math-verify is not used, an answer that nobody can grade counts as right or
    wrong, or one that is not known counts at all."""
    half = "\\frac{1}{2}"
    monkeypatch.setitem(sys.modules, "math_verify", SimpleNamespace(
        parse=lambda text: text, verify=lambda answer, text: {"$0.5$": True, "$0.4$": False}[text]))
    texts = ["\\boxed{0.5}", "\\boxed{0.4}", "\\boxed{broken}", "\\boxed{7}", "text"]
    assert fraction_correct(texts, [half, half, half, "7", None]) == 2 / 3
    assert capsys.readouterr().out.startswith("1 of 4 answers are not graded")
    assert fraction_correct(["text"], [None]) is None
    monkeypatch.setitem(sys.modules, "math_verify", None)
    assert fraction_correct(texts, [half, half, half, "7", None]) is None


def test_bench_exactness(run_bench, monkeypatch):
    """Failure 15: an output is not compared, or a broken state counts as equal or as rounding."""
    args = ("exactness", "--limit=1", "--max_new_tokens=8", "--temperatures=0,1")
    rows = run_bench(*args)["rows"]
    compared = {(row["drafter"], row["temperature"], row["against"]) for row in rows}
    for drafter in ("trained", "random", "oracle", "wrong"):
        compared.remove((drafter, 0, "transformers"))
        for temperature, against in itertools.product((0, 1), ("same shape", "1-token")):
            compared.remove((drafter, temperature, against))
    assert not compared
    for row in rows:
        if row["against"] != "1-token":  # failure 10: transformers reads the shipped target
            assert (row["identical"], row["margin"], row["verdict"]) == (1, None, "equal")

    commit = DecodeState.commit

    def forgetful_commit(self, n):  # failure 6: part of the recurrent state is lost
        commit(self, n)
        if isinstance(n, torch.Tensor):
            self.conv.zero_()

    monkeypatch.setattr(DecodeState, "commit", forgetful_commit)
    # only greedy outputs are compared with transformers
    rows = run_bench(*args, "--temperatures=0,", differs=True)["rows"]
    for row in rows:
        if row["against"] == "transformers" and row["drafter"] != "trained":
            assert row["identical"] == 0, row
            assert row["margin"] > 0, row
            assert row["verdict"] == "wrong state", row


def test_bench_exactness_by_hand():
    """The smallest margin instead of the largest, the fraction that differs, or a tau that counts
    the prefill's token."""
    def difference(position, margin, *lengths):
        rounds = [[length - 1, [5] * length] for length in lengths]
        return {"position": position, "margin": margin, "rounds": rounds}

    differences = [difference(None, None, 4, 4, 1), difference(4, 0.125, 3, 3),
                   difference(2, 0.25, 6), difference(7, None, 2, 1)]
    assert exactness.summarize(differences, "bfloat16") == {
        "prompts": 4, "identical": 0.25, "margin": 0.25, "tau": 24 / 8, "dtype": "bfloat16",
        "verdict": "rounding"}


@torch.no_grad()
@pytest.mark.parametrize("temperature", (0, 0.5))
def test_bench_margin_by_hand(temperature):
    """A margin is at a different position, lacks the noise, or is after the end of an output."""
    target = small_target()
    prompt = tokens_of(9).tolist()
    sampling = Sampling(temperature, seed=3)
    state = DecodeState(target, 1, 64, K)
    _, scores = prefill(target, torch.tensor([prompt + [4, 5]]), state)
    if temperature:
        noise = exactness.gumbel_noise(3, torch.tensor([0]), torch.tensor([11]), V)
        scores = scores / temperature + noise
    expected = abs(scores[0, 6] - scores[0, 7]).item()
    margin = exactness.margin_of(target, sampling, prompt, [4, 5, 6], [4, 5, 7])
    assert margin == pytest.approx(expected, rel=1e-3)
    assert exactness.margin_of(target, sampling, prompt, [4, 5], [4, 5, 7]) is None
    assert exactness.margin_of(target, sampling, prompt, [4, 5], [4, 5]) is None
