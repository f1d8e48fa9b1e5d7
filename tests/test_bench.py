"""bench.py: a benchmark that flatters (failure 15), miscounts, or cannot be resumed."""
import json
import math
import os
import sys
from statistics import median
from types import SimpleNamespace

import pytest
import torch

import bench
import draft_decode
from benchmarks import animation, common, curve, exactness, figures, speed
from benchmarks.acceptance import transcript
from benchmarks.common import Arm, Workload, decode_in_turns, summarize
from benchmarks.drafters import probability_for
from benchmarks.journal import Journal
from benchmarks.prompts import Prompt, is_correct, load_prompts, load_questions
from benchmarks.timing import in_turn
from chat import chat_prompt, stop_ids
from configurator import configure
from draft_decode import generate, timed_generate
from decode_state import DecodeState
from tests.common import (K, ROOT, Oracle, all_tokens, nano, read_jsonl, reference, shipped,
                          small_target)


@pytest.fixture
def config():
    """The keys of bench.py at their defaults."""
    return configure(vars(bench), [])


@pytest.fixture
def copies(monkeypatch):
    """A copy bandwidth of 1 GB/s, without the seconds of measuring it."""
    monkeypatch.setattr("benchmarks.machine.copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)


def lengths_of(rounds):
    return [len(one_round["tokens"]) for one_round in rounds]


# ------------------------------------------------------------------------------------------------
# figures


def test_bench_acceptance(run_bench, copies, tmp_path):
    """Failure 15: a report whose figures do not follow from its rounds, or a pair that lost its
    acceptance."""
    report = run_bench("acceptance", "--limit=4")
    rounds = read_jsonl(tmp_path / "acceptance.jsonl")
    lengths = lengths_of(rounds)
    assert report["command"] == "acceptance"
    assert report["prompts"] == 4
    assert report["identical"] == 1
    assert report["tau_micro"] == sum(lengths) / len(lengths) > 4
    taus = []
    for prompt in range(4):
        own_lengths = lengths_of([row for row in rounds if row["prompt"] == prompt])
        taus.append(sum(own_lengths) / len(own_lengths))
    assert report["tau_macro"] == pytest.approx(sum(taus) / 4)
    for slot in range(1, K):
        count = sum(row["accepted"] >= slot for row in rounds)
        assert report["accepted_up_to_slot"][slot - 1] == count / len(rounds)
    assert report["rounds_of_length"] == [lengths.count(n) for n in range(1, K + 1)]
    assert report["accuracy"]["target"] == report["accuracy"]["speculative"] >= 0.5
    speed = report["tokens_per_s"]
    assert report["speedup"] == speed["speculative"] / speed["target"]
    assert (tmp_path / "acceptance.png").stat().st_size > 1000


def test_bench_tau_by_hand(tmp_path):
    """Failure 15: tokens past a stop or past the limit counted. A stop in mid-round, a limit in
    mid-round, full blocks.

    The prompt's own token is in no round. Limit 20, 3 guesses right: 19 tokens, rounds of
    4 4 4 4 3. Stop at the 11th token: 10 tokens, rounds of 4 4 2. Limit 33, 15 right: 32 tokens,
    rounds of 16 16."""
    prompt, answer = reference()
    stop = answer[10]
    assert answer.index(stop) == 10
    ends = [(20, ()), (40, {stop}), (33, ())]  # limit and stops of each prompt
    oracles = [Oracle(len(prompt), answer, right) for right in (3, 3, 15)]

    def arm(drafters):
        requests = iter([0, 0, 1, 2])  # the first is the warm-up

        def decode(prompt_ids):
            number = next(requests)
            limit, stops = ends[number]
            return timed_generate(small_target(), drafters[number], prompt_ids, limit, stops)
        return Arm(decode, 1)

    arms = {"speculative": arm(oracles), "target_same_shape": arm([None] * 3),
            "target": arm([None] * 3)}
    journal = Journal(SimpleNamespace(out_dir=str(tmp_path), resume=False), "acceptance", {})
    rows = decode_in_turns(arms, [Prompt(prompt)] * 3, journal)
    lengths = []
    for row in rows:
        lengths.append([len(tokens) for _, tokens in row["speculative"]["rounds"]])
    assert lengths == [[4, 4, 4, 4, 3], [4, 4, 2], [16, 16]]
    report = summarize(rows, None, K)
    assert report["tau_micro"] == (19 + 10 + 32) / (5 + 3 + 2) == 6.1
    assert report["tau_macro"] == pytest.approx((19 / 5 + 10 / 3 + 16) / 3)
    assert report["identical"] == 1
    # the stop's round returned two guesses: a third was cut off
    assert report["accepted_up_to_slot"] == [1.0, 1.0, 0.9] + [0.2] * 12
    assert report["rounds_of_length"] == [0, 1, 1, 6] + [0] * 11 + [2]


def test_bench_speeds_by_hand():
    """Failure 15: tokens a second that count the prompt's own token, a speedup over the slow arm,
    outputs compared with the wrong arm, the least of the repeats instead of their median."""
    def row(tokens, seconds):
        return {"tokens": tokens, "rounds": [[1, tokens[1:]]], "seconds": seconds}

    rows = [
        {"answer": None, "speculative": row([7, 8, 9], 1.0), "target": row([7, 8, 8], 2.0),
         "target_same_shape": row([7, 8, 9], 4.0)},
        {"answer": None, "speculative": row([7, 8, 9], 1.0), "target": row([7, 8, 9], 6.0),
         "target_same_shape": row([7, 8, 9], 4.0)}]
    report = summarize(rows, None, K)
    assert report["tokens_per_s"] == {
        "speculative": 4 / 2, "target": 4 / 8, "target_same_shape": 4 / 8}
    assert report["speedup"] == 4
    assert report["identical"] == 1
    assert report["identical_to_steps"] == 0.5
    generations = [draft_decode.Generation([7], [], seconds) for seconds in (5.0, 1.0, 2.0)]
    assert common.arm_row(generations)["seconds"] == 2.0


def test_bench_arms_take_turns(tmp_path):
    """Arms that always run in the same order, so that one always has the warmer machine; an arm
    that pays for its warm-up; repeats that are missing."""
    calls = []

    def arm(name, repeats):
        def decode(prompt_ids):
            calls.append((name, prompt_ids[0]))
            return draft_decode.Generation([1], [], 0.0)
        return Arm(decode, repeats)

    prompts = [Prompt([10]), Prompt([11])]
    journal = Journal(SimpleNamespace(out_dir=str(tmp_path), resume=False), "speedup", {})
    decode_in_turns({"a": arm("a", 2), "b": arm("b", 2), "c": arm("c", 1)}, prompts, journal)
    assert [name for name, _ in calls[:3]] == ["a", "b", "c"]  # the warm-up
    assert calls[3:] == [
        ("c", 10), ("b", 10), ("a", 10), ("a", 10), ("b", 10),
        ("a", 11), ("b", 11), ("c", 11), ("b", 11), ("a", 11)]
    assert in_turn("ab", 0) == ["b", "a"]
    assert in_turn("ab", 1) == ["a", "b"]


def test_bench_times_the_first_draft(monkeypatch):
    """Failure 15: the drafter's first guess, or any round of either arm, is not in the seconds."""
    clock = [0.0]

    class SlowOracle(Oracle):
        def draft_logits(self, *args):
            clock[0] += 5.0
            return super().draft_logits(*args)

    monkeypatch.setattr(draft_decode.time, "perf_counter", lambda: clock[0])
    prompt, answer = reference()
    drafter = SlowOracle(len(prompt), answer, right=3)
    generation = timed_generate(small_target(), drafter, prompt, 20)
    assert len(generation.rounds) == 5
    assert generation.seconds == 5.0 * 5


def test_bench_speedup(run_bench, copies, tmp_path):
    """Failure 15: figures that contradict each other. tau of acceptance, of speedup and of the loop
    is one number."""
    args = ("--limit=2", "--max_new_tokens=16", "--repeats=2", "--hf")
    report = run_bench("speedup", *args)
    other = run_bench("acceptance", *args)
    target, tokenizer = nano()
    lengths = []
    for question, _ in load_questions("nano", 2):
        ids = chat_prompt(tokenizer, question)
        rounds = list(generate(target, shipped(), ids, 16, stop_ids(tokenizer)))
        lengths += [len(one_round.tokens) for one_round in rounds[1:]]
    assert report["tau_micro"] == other["tau_micro"] == sum(lengths) / len(lengths)
    assert report["tau_macro"] == other["tau_macro"]

    rows = read_jsonl(tmp_path / "speedup.jsonl")
    gains = [row["speedup"] for row in rows]
    for row in rows:
        for arm in ("speculative", "target", "transformers"):
            assert len(row[arm]["repeats"]) == 2
            assert row[arm]["seconds"] == median(row[arm]["repeats"])
        rate = {arm: (len(row[arm]["tokens"]) - 1) / row[arm]["seconds"]
                for arm in ("speculative", "target")}
        assert row["speedup"] == pytest.approx(rate["speculative"] / rate["target"])
    assert report["prompts"] == report["timed"] == 2
    assert report["min"] == min(gains) <= report["geomean"] <= max(gains) == report["max"]
    assert report["geomean"] == pytest.approx(math.prod(gains) ** 0.5)
    assert report["median"] == sum(gains) / 2
    assert report["faster"] == sum(gain > 1 for gain in gains)
    assert report["identical"] == report["identical_to_transformers"] == 1
    speed = report["tokens_per_s"]
    assert speed["transformers"] > 1
    assert report["speedup_over_transformers"] == pytest.approx(
        speed["speculative"] / speed["transformers"])

    card = report["card"]
    assert card["bytes"]["step"] == 4 * card["parameters"]["target"]
    assert card["floor_seconds"]["step"] == card["bytes"]["step"] / 1e9
    ratio = card["bytes"]["step"] / card["bytes"]["round"]
    assert card["ceiling"] == pytest.approx(report["tau_micro"] * ratio)
    assert card["share_of_ceiling"] == report["speedup"] / card["ceiling"]
    assert (tmp_path / "speedup.png").stat().st_size > 1000


# ------------------------------------------------------------------------------------------------
# an interruption


def without_clock(report):
    """A report without what two runs of it do not share."""
    timed = ("tokens_per_s", "speedup", "card", "geomean", "min", "median", "max", "faster")
    rest = {key: value for key, value in report.items() if key not in timed}
    if rest.get("transcript"):
        for entry in rest["transcript"]["rounds"] + rest["transcript"]["steps"]:
            del entry["seconds"]
    return rest


@pytest.mark.parametrize("command, generations", (("acceptance", 3 + 3), ("exactness", 2 + 4)))
def test_bench_resume_after_an_interruption(
        run_bench, copies, monkeypatch, tmp_path, command, generations):
    """A torn line, prompts measured twice or not at all, or rows of another run taken for this
    one's.

    generations: of the first prompt. Of acceptance, three arms and their warm-up; of exactness, two
    modes of the target alone and four drafters."""
    args = (command, "--limit=3", "--max_new_tokens=8", "--dtypes=float32", "--temperatures=1,")
    module = common if command == "acceptance" else exactness
    whole = run_bench(*args)
    assert not list(tmp_path.glob("*.part.jsonl"))

    prompts_measured = []

    def until(count):
        def decode(target, drafter, prompt_ids, *rest):
            prompts_measured.append(tuple(prompt_ids))
            if len(prompts_measured) > count:
                raise KeyboardInterrupt
            return timed_generate(target, drafter, prompt_ids, *rest)
        return decode

    # interrupted within the second prompt
    monkeypatch.setattr(module, "timed_generate", until(generations + 1))
    with pytest.raises(SystemExit, match="interrupted: .*--resume"):
        run_bench(*args)
    part = tmp_path / f"{command}.part.jsonl"
    before = part.read_text()
    assert before.endswith("\n")
    assert len(read_jsonl(part)) == 2  # the setup and the first prompt
    part.write_text(before + before[:40])  # as a power cut leaves it

    with pytest.raises(SystemExit, match="made with count = 3, now it is 2"):
        run_bench(command, "--limit=2", *args[2:], "--resume")
    prompts_measured.clear()
    monkeypatch.setattr(module, "timed_generate", until(1000))
    report = run_bench(*args, "--resume")
    assert without_clock(report) == without_clock(whole)
    assert not part.exists()
    # acceptance warms up on the first prompt
    assert len(set(prompts_measured)) == (3 if command == "acceptance" else 2)
    with pytest.raises(SystemExit, match="curve cannot be resumed"):
        run_bench("curve", "--resume")


# ------------------------------------------------------------------------------------------------
# prompts and answers


def test_bench_prompts_by_name(tmp_path):
    """Another question than the published figures were measured with; a copy of a data set that is
    none of it."""
    files = {"math500": {"problem": "1+1?", "answer": "2"},
             "gsm8k": {"question": "1+1?", "answer": "so\n#### 1,002"},
             "humaneval": {"task_id": "0", "prompt": "def f():"}}
    copies = {}
    for name, row in files.items():
        path = tmp_path / f"{name}.jsonl"
        path.write_text(json.dumps(row) + "\n")
        copies[name] = f"{name}:{path}"
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert load_questions(copies["math500"], 9) == [("1+1?" + suffix, "2")]
    assert load_questions(copies["gsm8k"], 9) == [("1+1?" + suffix, "1002")]
    (question, answer), = load_questions(copies["humaneval"], 9)
    assert "```python\ndef f():\n```" in question
    assert answer is None
    for name, hint in (
            (f"math500:{tmp_path}/gsm8k.jsonl", "row 1 is none of math500"),
            ("gsm8k:nowhere", "no file"),
            ("gsm8k", "hub does not give"),
            ("mbpp", "none of nano, plain, refusals, math500, gsm8k, humaneval")):
        with pytest.raises(ValueError, match=hint):
            load_questions(name, 9)


def test_bench_accuracy_without_math_verify(monkeypatch):
    """A missing package that takes all other figures along, or right answers that count as wrong
    because it is missing."""
    pytest.importorskip("math_verify")
    assert is_correct("\\boxed{0.5}", "\\frac{1}{2}") is True
    assert is_correct("\\boxed{0.4}", "\\frac{1}{2}") is False
    monkeypatch.setitem(sys.modules, "math_verify", None)  # importing it fails
    for text, answer, verdict in (
            ("\\boxed{ x^2 }", "x^2", True),
            ("\\boxed{007}", "7", True),
            ("\\boxed{8}", "7", False),
            ("no box", "7", False),
            ("\\boxed{16/3}", "16/3", True),
            ("\\boxed{32/6}", "16/3", True),
            ("\\boxed{5}", "16/3", False),
            ("\\boxed{14 remainder 2}", "14 remainder 2", True),
            ("\\boxed{14}", "14 remainder 2", False),
            ("\\boxed{0.5}", "\\frac{1}{2}", None)):
        assert is_correct(text, answer) is verdict, text

    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: tokens)

    def report_of(*texts):
        arm_of = {text: {"tokens": text, "rounds": [], "seconds": 1.0} for text in texts}
        rows = []
        for text in texts:
            arms = dict.fromkeys(("speculative", "target", "target_same_shape"), arm_of[text])
            rows.append({"answer": "7"} | arms)
        return summarize(rows, tokenizer, K)

    report = report_of("\\boxed{7}", "\\boxed{8}")
    assert report["accuracy"]["target"] == 0.5
    assert "math-verify" not in common.accuracy_text(report)
    report = report_of("\\boxed{7}", "\\boxed{7.0}")
    assert report["accuracy"]["target"] is None
    assert report["tau_micro"] == 0
    line = common.accuracy_text(report)
    assert line.startswith("unknown target, unknown speculative; ")
    assert line.endswith("pip install math-verify")


# ------------------------------------------------------------------------------------------------
# exactness


def test_bench_exactness(run_bench, monkeypatch):
    """Failure 15: nobody compares outputs. Every arm is the target's own; a broken state is seen,
    and its margin."""
    args = ("exactness", "--limit=1", "--max_new_tokens=24", "--dtypes=float32",
            "--temperatures=0,1")
    rows = run_bench(*args)["rows"]
    expected = set()
    for drafter in ("trained", "random", "oracle", "wrong"):
        expected.add((drafter, 0, "transformers"))
        for temperature in (0, 1):
            for against in ("fixed shape", "one row"):
                expected.add((drafter, temperature, against))
    assert {(row["drafter"], row["temperature"], row["against"]) for row in rows} == expected
    assert {"dtype", "prompts", "margin"} < set(rows[0])
    for row in rows:
        if row["against"] == "fixed shape":
            assert row["identical"] == 1
            assert row["margin"] is None

    commit = DecodeState.commit

    def forgetful_commit(self, n):  # failure 6: part of the recurrent state is lost
        commit(self, n)
        if isinstance(n, torch.Tensor):
            self.conv.zero_()

    monkeypatch.setattr(DecodeState, "commit", forgetful_commit)
    rows = run_bench(*args, differs=True)["rows"]
    for row in rows:
        if row["against"] == "transformers" and row["drafter"] != "trained":
            assert row["identical"] == 0, row
            assert row["margin"] > 0, row


# ------------------------------------------------------------------------------------------------
# curve


def test_bench_curve(run_bench):
    """An oracle whose tau is not what was asked for; a table without the trained drafter."""
    rows = run_bench("curve", "--limit=1", "--max_new_tokens=24")["rows"]
    taus = [row["tau"] for row in rows if row["drafter"] == "oracle"]
    assert taus[0] == 1
    assert taus[-1] == 16
    assert taus == sorted(taus)
    assert rows[-1]["drafter"] == "trained"


def test_bench_curve_by_hand():
    """A speedup that is the inverse of one, or that compares the tokens of one prompt with the
    steps of another."""
    steps = [curve.Timed(10, 10, 10.0), curve.Timed(10, 10, 20.0)]  # of 1 s and of 2 s
    rounds = [curve.Timed(8, 2, 2.0), curve.Timed(4, 1, 2.0)]
    point, = curve.points_of({"one row": steps, 4: rounds})
    assert point == {"drafter": "oracle", "tau": 12 / 3, "speedup": (8 * 1 + 4 * 2) / 4,
                     "round_s": 4 / 3, "step_s": 16 / 12}


def test_bench_oracle_has_the_tau_that_was_asked_for():
    """A probability that does not give its tau: 1 + p + .. + p^(K-1), checked by drawing."""
    for tau in (1.5, 4.0, 12.0):
        p = probability_for(tau, K)
        generator = torch.Generator().manual_seed(0)
        right = torch.rand(20000, K - 1, generator=generator) < p
        accepted = right.long().cumprod(-1).sum(-1)
        assert abs(1 + accepted.double().mean() - tau) < 0.1


# ------------------------------------------------------------------------------------------------
# speed


def test_bench_speed_compares_a_token_with_a_token(run_bench, copies, monkeypatch):
    """The time of a round, which makes several tokens, set against one token of another program."""
    seconds = {"one row": [1.0], "block": [2.0], "round": [4.0], "peer, one token": [3.0],
               "peer, a block": [5.0], "peer, generate": [6.0]}
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: 1e9)
    monkeypatch.setattr(speed, "race", lambda arms: {name: seconds[name] for name in arms})
    report = run_bench("speed", "--parts=decoding", "--assumed_tau=8", "--limit=1")
    step, block, whole_round, token = report["rows"]
    assert (step["seconds"], step["ratio"]) == (1.0, 3.0)
    assert (block["seconds"], block["ratio"]) == (2.0, 2.5)
    assert (whole_round["seconds"], whole_round["peer"]) == (4.0, None)
    assert (token["seconds"], token["ratio"]) == (0.5, 12.0)
    assert "tau 8" in token["name"]
    assert token["floor_seconds"] == whole_round["floor_seconds"] / 8
    for flag, hint in (("--assumed_tau=0", "at least one token"), ("--parts=memory", "is none of")):
        with pytest.raises(SystemExit, match=hint):
            run_bench("speed", flag)


def test_bench_speed_of_training(run_bench, copies, monkeypatch):
    """A training row whose tokens, samples or operations are not those of its steps."""
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: 1e9)
    row, = run_bench("speed", "--parts=training", "--limit=1")["rows"]
    assert row["tokens_per_s"] == pytest.approx(512 * row["samples_per_s"])
    assert row["seconds"] > 0
    assert row["mfu"] is None
    assert row["floor_seconds"] > 1


# ------------------------------------------------------------------------------------------------
# pictures


def test_bench_figures(config, tmp_path, monkeypatch):
    """A picture of a run that never was: what its rounds returned is not the target's answer to
    that prompt."""
    monkeypatch.chdir(ROOT)
    with open(os.path.join(ROOT, "logs", "acceptance_nano.json")) as f:
        logged = json.load(f)["transcript"]
    target, tokenizer = nano()
    stops = stop_ids(tokenizer)
    prompts = load_prompts(config, 200, target, tokenizer)
    prompt = prompts[logged["prompt"]]
    assert logged["question"] == prompt.question
    answer = all_tokens(generate(target, None, prompt.ids, 512, stops))

    pieces = [logged["first"]]
    for one_round in logged["rounds"]:
        assert one_round["anchor"] == pieces[-1]
        pieces += one_round["guesses"][:one_round["accepted"]]
        if one_round["own"] is not None:
            pieces.append(one_round["own"])
    assert "".join(pieces) == tokenizer.decode(answer)
    text = tokenizer.decode(answer, skip_special_tokens=True)
    in_rounds = sum([one_round["texts"] for one_round in logged["rounds"]], [logged["first"]])
    in_steps = [logged["first"]] + [step["text"] for step in logged["steps"]]
    assert in_rounds == in_steps
    assert "".join(in_steps) == text
    assert len(in_steps) == len(answer)

    workload = Workload(target, shipped(), tokenizer, prompts, stops)
    config.device = "cpu"
    again = transcript(config, workload, logged["prompt"])
    for mode in ("rounds", "steps"):
        for before, now in zip(logged[mode], again[mode], strict=True):
            assert before | {"seconds": 0} == now | {"seconds": 0}

    figures.draw(tmp_path)
    for name in ("acceptance.png", "curve.png", "decoding.gif"):
        assert (tmp_path / name).stat().st_size > 1000


def test_bench_animation_keeps_the_logged_times(tmp_path):
    """An animation that flatters: its halves do not end when they did, in their true ratio."""
    from PIL import Image
    rounds = [{"texts": ["b", "c", "d"], "accepted": 2, "own": "d", "seconds": 0.04}]
    steps = [{"text": text, "seconds": 0.04} for text in "bcd"]
    logged = {"question": "?", "first": "a", "rounds": rounds, "steps": steps}
    report = {"transcript": logged, "setup": {"target": "T", "device": "cpu", "dtype": "float32"}}
    animation.decoding(str(tmp_path / "a.gif"), report, slowdown=20)
    pieces = animation.round_pieces(rounds[0])
    assert pieces == [("b", animation.GREEN), ("c", animation.GREEN), ("d", animation.BLUE)]

    # each half changes when a forward of 40 ms ends, 20 times slower
    changes = {"left": [], "right": []}
    texts = {}
    top = animation.MARGIN + 4 * animation.LINE  # of the texts, below the clocks
    with Image.open(tmp_path / "a.gif") as gif:
        milliseconds = 0
        for number in range(gif.n_frames):
            gif.seek(number)
            frame = gif.convert("RGB")
            for half, left in (("left", 0), ("right", animation.COLUMN)):
                box = (left, top, left + animation.COLUMN, top + 2 * animation.LINE)
                text = frame.crop(box).tobytes()
                if text != texts.get(half, text):
                    changes[half].append(milliseconds)
                texts[half] = text
            milliseconds += gif.info["duration"]
    assert changes["left"] == pytest.approx([800, 1600, 2400], abs=animation.FRAME_MS)
    assert changes["right"] == pytest.approx([800], abs=animation.FRAME_MS)
    assert milliseconds >= 2400 + animation.PAUSE_MS
