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
from benchmarks import (acceptance, animation, common, curve, drafters, exactness, figures, machine,
                        speedup, throughput, timing)
from benchmarks.acceptance import transcript
from benchmarks.common import Arm, Workload, decode_in_turns, summarize, timed_generate_many
from benchmarks.drafters import probability_for
from benchmarks.journal import Journal
from benchmarks.peer import peer_answer
from benchmarks.prompts import Prompt, is_correct, load_prompts, load_questions, random_prompts
from benchmarks.timing import in_turn
from tokenizer import chat_prompt, stop_ids
from configurator import configure
from draft_decode import Generation, RoundOutput, generate, timed_generate
from decode_state import DecodeState
from model import DFlashDraftModel
from sampling import Sampling
from target import Target
from tests.common import (HIDDEN, K, ROOT, V, Oracle, all_tokens, nano, phase_1_2, read_jsonl,
                          reference, shipped, small_drafter, small_target, tokens_of, write_jsonl)


@pytest.fixture
def config():
    """The keys of bench.py at their defaults."""
    return configure(vars(bench), [])


@pytest.fixture
def copies(monkeypatch):
    """A copy bandwidth of 1 GB/s, without the seconds of measuring it."""
    monkeypatch.setattr("benchmarks.machine.copy_bandwidth", lambda device: 1e9)


def lengths_of(rounds):
    return [len(one_round["tokens"]) for one_round in rounds]


def changed(config, **values):
    """A copy of a configuration with other values."""
    return SimpleNamespace(**vars(config) | values)


# ------------------------------------------------------------------------------------------------
# keys


SAMPLING = Sampling(temperature=0.7, top_k=5, top_p=0.9, seed=3, draft_temperature=0.5)


@pytest.fixture
def requests(monkeypatch):
    """What bench.py asks of a decoder, which here decodes nothing: a list of
    (max_new_tokens, stops, sampling, dtypes of the models)."""
    requests = []

    def keep_many(target, drafter, prompts, max_new_tokens, slots, *rest):
        return [keep(target, drafter, prompt, max_new_tokens, *rest) for prompt in prompts]

    def keep(target, drafter, prompt_ids, max_new_tokens, stops=(), tokens_per_forward=None,
             sampling=None, decoders=None, on_piece=None):
        dtypes = {target.embed_tokens.weight.dtype}
        if isinstance(drafter, DFlashDraftModel):
            dtypes.add(drafter.fc.weight.dtype)
        requests.append((max_new_tokens, stops, sampling, dtypes))
        if on_piece is not None:
            decoders["x"] = SimpleNamespace(block=torch.zeros(1, K, dtype=torch.long))
            on_piece([1], RoundOutput([1], 0))
            on_piece([1, 2], RoundOutput([2], 0))
        return Generation([1, 2], [RoundOutput([2], 0)], 1.0)

    def keep_generate(*request):
        return iter([keep(*request)])

    for module in (acceptance, curve):
        monkeypatch.setattr(module, "timed_generate", keep)
    for module in (common, exactness):
        monkeypatch.setattr(module, "timed_generate_many", keep_many)
    monkeypatch.setattr(acceptance, "generate", keep_generate)
    return requests


FLAGS = ("--limit=2", "--max_new_tokens=7", "--top_k=5", "--top_p=0.9", "--seed=3",
         "--draft_temperature=0.5", "--repeats=5", "--oracle=0.25")
ONE = ("--temperature=0.7", "--dtype=bfloat16", "--temperatures=0.1,", "--dtypes=float32")
SEVERAL = ("--temperature=0.1", "--dtype=float32", "--temperatures=0.7,", "--dtypes=bfloat16")


@pytest.mark.parametrize("command, flags, max_new_tokens", (
    ("acceptance", ONE, 7), ("speedup", ONE, 7), ("exactness", SEVERAL, 7),
    ("curve", ONE, 1 + 8 * K)))
def test_bench_keys_arrive_where_tokens_are_chosen(
        run_bench, copies, requests, monkeypatch, tmp_path, command, flags, max_new_tokens):
    """A key of sampling, a limit, a dtype or a number of repeats that does not arrive: the report
    has the same form, of another run than was asked for."""
    probabilities = []

    def learn(self, prompt_ids, answer, p, number=0):
        probabilities.append(p)

    monkeypatch.setattr(drafters.Oracle, "learn", learn)
    report = run_bench(command, *FLAGS, *flags)
    _, tokenizer = nano()
    for limit, stops, sampling, dtypes in requests:
        assert limit == max_new_tokens
        assert sampling == SAMPLING
        assert dtypes == {torch.bfloat16}
        assert command == "curve" or stops == stop_ids(tokenizer)

    if command == "acceptance":  # the first piece is of the prefill, in no round
        assert len(report["transcript"]["rounds"]) == 1
        assert len(report["transcript"]["steps"]) == 1
    if command == "speedup":  # a warm-up of three arms; then two of them five times a prompt
        assert len(requests) == 3 + 2 * (5 + 5 + 1)
    if command == "exactness":  # two modes of the target alone, four drafters
        assert len(requests) == 2 * (2 + 4)
        assert probabilities == [0.25, 0.0] * 2
    with open(tmp_path / f"{command}.json") as f:
        setup = json.load(f)["setup"]
    for key, value in (("top_k", 5), ("top_p", 0.9), ("seed", 3), ("count", 2),
                       ("max_new_tokens", 7)):
        assert setup[key] == value, key


def test_bench_loads_by_its_keys(config, monkeypatch):
    """thinking or compile that does not arrive, compilation unasked, or another number of
    prompts than limit."""
    monkeypatch.chdir(ROOT)
    compiled = []
    monkeypatch.setattr(Target, "compile_decoding", lambda self: compiled.append("target"))
    monkeypatch.setattr(
        DFlashDraftModel, "compile_decoding", lambda self: compiled.append("drafter"))
    _, tokenizer = nano()
    question, _ = load_questions("nano", 1)[0]
    for thinking in (False, True):
        workload = common.load(changed(config, thinking=thinking, compile=thinking), 3)
        assert workload.prompts[0].ids == chat_prompt(tokenizer, question, thinking)
        assert len(workload.prompts) == 3
        assert compiled == ["target", "drafter"] * thinking
    assert len(common.load(changed(config, limit=2), 3).prompts) == 2


SETUP_KEYS = ("target", "drafter", "device", "dtype", "compile", "prompts", "max_new_tokens",
              "thinking", "slots", "temperature", "top_k", "top_p", "seed", "draft_temperature")


@pytest.mark.parametrize("key", SETUP_KEYS)
def test_bench_setup_has_every_key_of_its_rows(config, key):
    """--resume that goes on with rows which were measured with other keys."""
    prompts = [Prompt([1, 2], "3")]
    setup = common.setup_of(config, prompts, (1,))
    other = 0.5 if key == "top_p" else 4
    assert common.setup_of(changed(config, **{key: other}), prompts, (1,)) != setup
    assert common.setup_of(config, prompts, (2,)) != setup
    assert common.setup_of(config, [Prompt([1, 2], "4")], (1,)) != setup
    assert common.setup_of(config, [Prompt([1, 3], "3")], (1,)) != setup


# ------------------------------------------------------------------------------------------------
# clocks and rates


def test_bench_clocks_by_hand(monkeypatch):
    """Failure 15: seconds of several calls given as those of one, a warm-up that counts, or arms
    that do not take turns. Each call takes 2 s."""
    now = [0.0]
    calls = []

    def call():
        now[0] += 2.0

    def arm(name):
        def measure():
            calls.append(name)
            return float(len(calls))
        return measure

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    assert timing.seconds_of(call, 3) == 2.0
    seconds = timing.race({"a": arm("a"), "b": arm("b")}, repeats=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_bench_rates_by_hand(monkeypatch):
    """Failure 15: a floor that is half or twice as high as the machine's rates: a copy reads and
    writes 256 MB, a multiply-add counts as two."""
    monkeypatch.setattr(machine, "race", lambda arms: dict.fromkeys(arms, [9.0, 0.5, 0.1]))
    assert machine.copy_bandwidth("cpu") == 2 * (256 << 20) / 0.5
    assert machine.product_rate("cpu", "float32") == 2 * 1024 * 1024 * 3584 / 0.5


@pytest.mark.parametrize("shape", ("tied", "untied"))
def test_bench_bytes_by_hand(shape):
    """Failure 15: a floor without the head, which a round reads twice, or with an embedding of
    which only a few rows are read."""
    target = small_target(shape)
    drafter = small_drafter()
    head = 4 * V * HIDDEN
    layers = 4 * sum(p.numel() for p in target.layers.parameters()) + 4 * HIDDEN  # and the norm
    of_drafter = 4 * sum(p.numel() for p in drafter.parameters())
    assert machine.bytes_read(target, drafter) == {
        "step": layers + head, "round": layers + 2 * head + of_drafter}


# ------------------------------------------------------------------------------------------------
# figures


def test_bench_acceptance(run_bench, copies, tmp_path):
    """Failure 15: a report whose figures do not follow from its rounds, or a pair that lost its
    acceptance."""
    report = run_bench("acceptance", "--limit=3")
    rounds = read_jsonl(tmp_path / "acceptance.jsonl")
    lengths = lengths_of(rounds)
    assert report["command"] == "acceptance"
    assert report["prompts"] == 3
    assert report["identical"] == 1
    assert report["tau_micro"] == sum(lengths) / len(lengths) > 4
    taus = []
    for prompt in range(3):
        own_lengths = lengths_of([row for row in rounds if row["prompt"] == prompt])
        taus.append(sum(own_lengths) / len(own_lengths))
    assert report["tau_macro"] == pytest.approx(sum(taus) / 3)
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

        def decode(prompts):
            number = next(requests)
            limit, stops = ends[number]
            return [timed_generate(small_target(), drafters[number], prompts[0], limit, stops)]
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
         "target_same_shape": row([7, 8, 9], 8.0)},
        {"answer": None, "speculative": row([7, 8, 9], 1.0), "target": row([7, 8, 9], 6.0),
         "target_same_shape": row([7, 8, 9], 8.0)}]
    report = summarize(rows, None, K)
    assert report["tokens_per_s"] == {
        "speculative": 4 / 2, "target": 4 / 8, "target_same_shape": 4 / 16}
    assert report["speedup"] == 4
    assert report["identical"] == 1
    assert report["identical_to_steps"] == 0.5
    generations = [draft_decode.Generation([7], [], seconds) for seconds in (5.0, 1.0, 2.0)]
    assert common.arm_row(generations)["seconds"] == 2.0


def test_bench_rounds_by_hand():
    """A transcript of the best prompt instead of the median one; rounds of one prompt that are
    numbered as those of another."""
    def row(prompt, *lengths):
        rounds = [[length - 1, [5] * length] for length in lengths]
        return {"prompt": prompt, "speculative": {"rounds": rounds}}

    rows = [row(0, 9), row(1), row(2, 4, 6), row(3, 2)]
    assert acceptance.median_prompt(rows) == 2
    assert acceptance.median_prompt([row(0)]) is None
    lines = acceptance.round_rows(rows[2:])
    assert lines == [
        {"prompt": 2, "round": 0, "accepted": 3, "tokens": [5] * 4},
        {"prompt": 2, "round": 1, "accepted": 5, "tokens": [5] * 6},
        {"prompt": 3, "round": 0, "accepted": 1, "tokens": [5] * 2}]


def test_bench_exit_status_by_hand():
    """Outputs that differ from the target's own, and status 0; or status 1 for rounding."""
    def exactness_report(same_rows, one_row):
        rows = [{"against": "one row", "identical": one_row},
                {"against": "fixed shape", "identical": same_rows}]
        return {"command": "exactness", "rows": rows}

    assert not bench.outputs_differ(exactness_report(1, 0.5))
    assert bench.outputs_differ(exactness_report(0.9, 1))
    for identical, to_steps in ((1, 0.5), (0.9, 1)):
        report = {"command": "acceptance", "identical": identical, "identical_to_steps": to_steps}
        assert bench.outputs_differ(report) == (identical < 1)
    assert not bench.outputs_differ({"command": "speedup", "identical": 0.5})


def printed_lines(capsys):
    """{what a printed line is of: its values}."""
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        lines[line[:20].strip()] = line[20:].strip()
    return lines


REPORT = {  # every figure is another number
    "slots": 1,
    "prompts": 8,
    "timed": 7,
    "faster": 6,
    "rounds": 20,
    "tokens": 90,
    "tau_micro": 4.5,
    "tau_macro": 4.25,
    "accepted_up_to_slot": [0.75, 0.5, 0.25],
    "identical": 1.0,
    "identical_to_steps": 0.875,
    "accuracy": {"target": 0.625, "speculative": 0.5},
    "boxed": {"target": 0.875, "speculative": 0.75},
    "need_math_verify": 0,
    "tokens_per_s": {"target": 10.0, "target_same_shape": 5.0, "speculative": 30.0},
    "speedup": 3.0,
    "geomean": 2.75,
    "min": 1.5,
    "median": 2.5,
    "max": 3.5,
    "speedup_over_transformers": 9.0,
    "identical_to_transformers": 0.25,
    "card": {"device": "D", "torch": "T", "share_of_ceiling": 0.8},
}


def test_bench_acceptance_prints_its_figures(config, monkeypatch, capsys):
    """A line whose figure is that of another line; slots numbered from 0."""
    monkeypatch.setattr(acceptance, "card", lambda *args: args[-2:])
    monkeypatch.setattr(acceptance, "print_card", lambda card: print(f"{'card':20}{card}"))
    acceptance.print_report(config, Workload(None, None, None, [], ()), REPORT)
    lines = printed_lines(capsys)
    assert lines["card"] == "(4.5, 3.0)"
    assert lines["tau, micro"] == "4.500   90 tokens in 20 rounds"
    assert lines["tau, macro"] == "4.250   mean over 8 prompts"
    assert lines["accepted up to slot"] == "1:0.75 2:0.50 3:0.25"
    assert lines["identical outputs"].startswith("100.0% ")
    assert lines[""].startswith("87.5% ")
    assert lines["accuracy"] == "62.5% target, 50.0% speculative"
    assert lines["tokens/s"] == "10 target, 5 target_same_shape, 30 speculative"
    assert lines["speedup"].startswith("3.00 ")


def test_bench_speedup_prints_its_figures(config, monkeypatch, capsys):
    """A line whose figure is that of another line; a method that is not that of the run."""
    monkeypatch.setattr(speedup, "print_card", lambda card: None)
    config = changed(config, temperature=0.7, top_k=5, top_p=0.9, seed=3, thinking=True,
                     compile=True, max_new_tokens=77, repeats=5, dtype="bfloat16")
    speedup.print_report(config, REPORT)
    lines = printed_lines(capsys)
    assert lines["faster"] == "6 of 8 prompts; 1 ended at the first token"
    assert lines["speedup a prompt"] == "2.75x geometric mean; 1.50x to 3.50x, median 2.50x"
    assert lines["speedup in all"] == "3.00x in total time, 80% of the ceiling"
    assert lines["tau"] == "4.500 micro, 4.250 macro; 90 tokens in 20 rounds"
    assert lines["identical outputs"].startswith("100.0% to the target alone at the same shape, 87")
    assert lines["boxed an answer"] == "87.5% target, 75.0% speculative"
    assert lines["accuracy"] == "62.5% target, 50.0% speculative"
    assert lines["transformers"] == "9.00x over its generate, 25.0% identical outputs"
    method = speedup.method(config, REPORT)
    for part in ("8 prompts of nano", "temperature 0.7, top_k 5, top_p 0.9, seed 3",
                 "at most 77 new tokens", "thinking on", "bfloat16 on D, torch T, compiled",
                 "median of 5", "one sequence at a time"):
        assert part in method
    assert "4 sequences at once" in speedup.method(config, REPORT | {"slots": 4})


def test_bench_card_prints_its_figures(capsys):
    """Milliseconds or megabytes that are a thousand times too many, or those of another line."""
    machine.print_card({
        "device": "D", "dtype": "float32", "torch": "T", "copy_bytes_per_s": 2e9, "ceiling": 2.5,
        "parameters": {"target": 3000, "drafter": 400},
        "bytes": {"step": 4e6, "round": 6e6}, "floor_seconds": {"step": 0.002, "round": 0.003}})
    lines = printed_lines(capsys)
    assert lines["device"] == "D, float32, torch T; copies 2.0 GB/s"
    assert lines["parameters"] == "3,000 target, 400 drafter"
    assert lines["target step"] == "reads 4.0 MB of weights: 2.000 ms at least"
    assert lines["round"] == "reads 6.0 MB of weights: 3.000 ms at least"
    assert lines["ceiling"].startswith("2.50x at the measured tau")


def test_bench_time_of_transformers_by_hand(config, monkeypatch):
    """Failure 15: a peer whose time has its prefill in it. That takes 2 s here, a token 0.5 s."""
    now = [0.0]

    def answer(peer, prompt_ids, max_new_tokens, stops, block_size):
        now[0] += 2.0 + 0.5 * (max_new_tokens - 1)
        return [7] * max_new_tokens

    monkeypatch.setattr(speedup, "transformers_peer", lambda target: None)
    monkeypatch.setattr(speedup, "peer_answer", answer)
    monkeypatch.setattr(speedup.time, "perf_counter", lambda: now[0])
    config = changed(config, max_new_tokens=9, repeats=4)
    workload = Workload(None, small_drafter(), None, [], ())
    arm = speedup.transformers_arm(config, workload)
    assert arm.repeats == 4
    assert arm.decode([[1, 2]]) == [Generation([7] * 9, [], 4.0)]


def test_bench_boxed_and_faster_by_hand(config, monkeypatch):
    """Shares of answers without a box; prompts as fast as the target alone that count as faster;
    a row whose answer had no round."""
    def arm(text, tokens, seconds):
        rounds = [[1, [0] * (tokens - 1)]] if tokens > 1 else []
        return {"tokens": [0] * tokens, "rounds": rounds, "seconds": seconds, "text": text}

    rows = []
    for seconds, text in ((1.0, "\\boxed{1}"), (2.0, "1"), (4.0, "1"), (1.0, "1")):
        one_row = arm(text, 5, 2.0)
        rows.append({"answer": "1", "speculative": arm(text, 5, seconds), "target": one_row,
                     "target_same_shape": one_row})
    first_token = arm("1", 1, 0.0)
    rows.append({"answer": None} | dict.fromkeys(
        ("speculative", "target", "target_same_shape"), first_token))
    speedup.add_gains(rows)
    assert [row["speedup"] for row in rows] == [2.0, 1.0, 0.5, 2.0, None]
    assert [row["tau"] for row in rows] == [4, 4, 4, 4, None]

    texts = iter([row["target"]["text"] for row in rows[:4]] * 4)
    tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: next(texts))
    monkeypatch.setattr(speedup, "card", lambda *args: None)
    workload = Workload(None, small_drafter(), tokenizer, [], ())
    report = speedup.report_of(config, workload, rows)
    assert (report["faster"], report["timed"], report["prompts"]) == (2, 4, 5)
    assert (report["min"], report["median"], report["max"]) == (0.5, 1.5, 2.0)
    assert report["geomean"] == pytest.approx(2 ** 0.25)
    assert report["boxed"] == {"target": 0.25, "speculative": 0.25}
    assert report["accuracy"] == {"target": 0.25, "speculative": 0.25}
    with pytest.raises(ValueError, match="every answer ended with its first token"):
        speedup.report_of(config, workload, rows[4:])


def test_bench_arms_take_turns(tmp_path):
    """Arms that always run in the same order, so that one always has the warmer machine; an arm
    that pays for its warm-up; repeats that are missing."""
    calls = []

    def arm(name, repeats):
        def decode(prompts):
            calls.append((name, prompts[0][0]))
            return [draft_decode.Generation([1], [], 0.0)]
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


def test_bench_shares_the_time_of_slots(monkeypatch):
    """Failure 15: with several slots the time of a round counted once for each sequence, or that of
    reading a prompt counted; a sum that is not the time that passed."""
    clock = [0.0]
    rounds_run = []
    prefill = draft_decode.Decoder.start_sequence
    run_round = draft_decode.Decoder.run_round

    def slow_prefill(self, place, prompt_ids):
        clock[0] += 100.0
        return prefill(self, place, prompt_ids)

    def slow_round(self):
        clock[0] += 5.0
        rounds_run.append(self.is_active.sum().item())
        return run_round(self)

    monkeypatch.setattr(draft_decode.Decoder, "start_sequence", slow_prefill)
    monkeypatch.setattr(draft_decode.Decoder, "run_round", slow_round)
    monkeypatch.setattr(common.time, "perf_counter", lambda: clock[0])
    prompts = [tokens_of(length).tolist() for length in (4, 20, 9)]
    generations = timed_generate_many(
        small_target(), None, prompts, 7, 2, (), K, Sampling(), {})
    assert rounds_run == [2] * 6 + [1] * 6  # the third prompt has a slot for itself
    assert [len(generation.rounds) for generation in generations] == [6, 6, 6]
    assert [generation.seconds for generation in generations] == [20.0, 20.0, 20.0]
    for prompt, generation in zip(prompts, generations):
        expected = timed_generate(small_target(), None, prompt, 7, (), K)
        assert generation.tokens == expected.tokens
        assert generation.rounds == expected.rounds


def test_bench_portions_of_prompts(tmp_path):
    """A prompt that is measured twice or not at all with several slots; a resumed run that decodes
    what it has, or rows under other numbers."""
    assert common.portions(3, 1) == [range(0, 1), range(1, 2), range(2, 3)]
    assert common.portions(40, 2) == [range(0, 16), range(16, 32), range(32, 40)]
    calls = []

    def decode(prompts):
        calls.append([prompt[0] for prompt in prompts])
        return [Generation([prompt[0]], [], 0.0) for prompt in prompts]

    prompts = [Prompt([number]) for number in range(20)]
    config = SimpleNamespace(out_dir=str(tmp_path), resume=True)
    journal = Journal(config, "speedup", {})
    journal.rows_of([0, 5, 17], lambda missing: [{"a": number} for number in missing])
    journal = Journal(config, "speedup", {})
    rows = decode_in_turns({"a": Arm(decode, 1)}, prompts, journal, slots=2)
    assert [row["prompt"] for row in rows] == list(range(20))
    assert rows[5] == {"prompt": 5, "a": 5}
    for number in (1, 16, 19):
        assert rows[number]["a"]["tokens"] == [number]
    _, first, second = calls  # after the warm-up
    assert first == [1, 2, 3, 4, *range(6, 16)]
    assert second == [16, 18, 19]


def test_bench_slots(run_bench, copies, config, tmp_path):
    """--slots that does not arrive, or that changes what is returned; figures that do not say how
    many sequences they are of."""
    args = ("--limit=4", "--max_new_tokens=16")
    one = run_bench("acceptance", *args)
    three = run_bench("acceptance", *args, "--slots=3")
    assert (one["slots"], three["slots"]) == (1, 3)
    assert three["identical"] == 1
    for figure in ("tau_micro", "tau_macro", "tokens", "rounds_of_length"):
        assert three[figure] == one[figure]
    assert common.speed_text(three).endswith("3 sequences at once, all of them together")

    rows = run_bench("exactness", *args, "--slots=3", "--dtypes=bfloat16", "--temperatures=1,")
    for row in rows["rows"]:
        assert row["prompts"] == 4
        assert row["against"] != "fixed shape" or row["identical"] == 1
    with pytest.raises(SystemExit, match="give one number of sequences"):
        run_bench("acceptance", "--slots=1,2")
    with pytest.raises(SystemExit, match="leave --slots at 1"):
        run_bench("speedup", "--slots=2", "--hf")


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
        def decode(target, drafter, prompts, *rest):
            prompts_measured.extend(tuple(prompt) for prompt in prompts)
            if len(prompts_measured) > count:
                raise KeyboardInterrupt
            return timed_generate_many(target, drafter, prompts, *rest)
        return decode

    # interrupted within the second prompt
    monkeypatch.setattr(module, "timed_generate_many", until(generations + 1))
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
    monkeypatch.setattr(module, "timed_generate_many", until(1000))
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


def test_bench_random_prompts_by_hand():
    """Lengths that do not reach the longest, or ids outside the vocabulary."""
    prompts = random_prompts("random:64:256", 3, 10)
    assert [len(prompt.ids) for prompt in prompts] == [64, 128, 256]
    assert [len(prompt.ids) for prompt in random_prompts("random:64:256", 1, 10)] == [64]
    assert set(prompts[2].ids) == set(range(10))
    assert random_prompts("random:64:256", 3, 10) == prompts
    with pytest.raises(ValueError, match="write random:SHORTEST:LONGEST"):
        random_prompts("random:64", 3, 10)


def test_bench_limit_of_a_file(tmp_path):
    """One prompt more or less than the limit, or an empty line that counts as one."""
    rows = [{"question": str(number)} for number in range(4)]
    path = write_jsonl(tmp_path / "x.jsonl", [rows[0], "", *rows[1:]])
    for limit in (1, 2, 4, 9):
        questions = load_questions(str(path), limit)
        assert [question for question, _ in questions] == ["0", "1", "2", "3"][:limit]
    with pytest.raises(ValueError, match="limit = 0"):
        load_questions(str(path), 0)


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
            assert row["verdict"] == "equal"

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


def test_bench_exactness_by_hand(capsys):
    """The least margin instead of the largest; a share of outputs that differ; a tau that counts
    the prompt's own token; figures of another drafter."""
    def row(position, margin, counts):
        differences = [["a", "one row", position, margin], ["b", "one row", None, None]]
        return {"differences": differences, "rounds": {"a": counts, "b": [16, 1]}}

    rows = [row(None, None, [9, 3]), row(4, 0.25, [6, 2]), row(2, 0.5, [6, 1]),
            row(7, None, [3, 2])]
    (ours, ours_by_prompt), (other, _) = exactness.summarize(rows)
    assert ours == {"drafter": "a", "against": "one row", "prompts": 4, "identical": 0.25,
                    "margin": 0.5, "position": 2, "tau": 24 / 8}
    assert ours_by_prompt == [(None, None), (4, 0.25), (2, 0.5), (7, None)]
    assert (other["identical"], other["margin"], other["tau"]) == (1, None, 16)

    exactness.print_table([ours | {"dtype": "float32", "temperature": 0.7, "verdict": "equal"}])
    first, *_, last = capsys.readouterr().out.splitlines()
    assert first.startswith("4 prompts; ")
    assert last.split() == ["float32", "0.7", "a", "3.00", "one", "row", "25.0%", "0.5000", "2",
                            "equal"]


@torch.no_grad()
@pytest.mark.parametrize("temperature", (0, 0.5))
def test_bench_margin_by_hand(config, temperature):
    """A margin of other positions or without the noise; one where an output has ended."""
    target = small_target()
    prompt = tokens_of(9).tolist()
    sampling = Sampling(temperature, seed=3)
    workload = Workload(target, small_drafter(), None, [], ())
    comparison = exactness.Comparison(changed(config, device="cpu"), workload, {}, None, sampling)
    _, hidden = target(torch.tensor([prompt + [4, 5]]))
    scores = target.logits(hidden)[0, -1]
    if temperature:
        noise = exactness.gumbel_noise(3, torch.tensor([11]), V)[0]
        scores = scores / temperature + noise
    margin = comparison.margin(prompt, [4, 5, 6], [4, 5, 7], 2)
    assert margin == pytest.approx(abs(scores[6] - scores[7]).item(), rel=1e-3)
    assert comparison.margin(prompt, [4, 5], [4, 5, 7], 2) is None
    assert comparison.margin(prompt, [4, 5], [4, 5], None) is None


# ------------------------------------------------------------------------------------------------
# curve


def test_bench_curve(run_bench, monkeypatch):
    """An oracle whose tau is not what was asked for; a table without the trained drafter."""
    monkeypatch.setattr(curve, "BLOCKS", 4)
    rows = run_bench("curve", "--limit=1", "--max_new_tokens=24")["rows"]
    taus = [row["tau"] for row in rows if row["drafter"] == "oracle"]
    assert taus[0] == 1
    assert taus[-1] == 16
    assert taus == sorted(taus)
    assert rows[-1]["drafter"] == "trained"


def test_bench_curve_by_hand(capsys):
    """A speedup that is the inverse of one, or that compares the tokens of one prompt with the
    steps of another."""
    steps = [curve.Timed(10, 10, 10.0), curve.Timed(10, 10, 20.0)]  # of 1 s and of 2 s
    rounds = [curve.Timed(8, 2, 2.0), curve.Timed(4, 1, 2.0)]
    point, = curve.points_of({"one row": steps, 4: rounds})
    assert point == {"drafter": "oracle", "tau": 12 / 3, "speedup": (8 * 1 + 4 * 2) / 4,
                     "round_s": 4 / 3, "step_s": 16 / 12}
    # the prompt's own token is in no round
    generation = Generation([1, 2, 3, 4], [RoundOutput([2, 3], 1), RoundOutput([4], 0)], 5.0)
    assert curve.count(generation) == curve.Timed(3, 2, 5.0)
    curve.print_table([point])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["oracle", "4.00", "4.00x", "1333.33", "ms", "1333.33", "ms"]
    curve.print_table([point | {"tau": 2.0, "speedup": 1.5, "round_s": 0.003, "step_s": 0.004}])
    line = capsys.readouterr().out.splitlines()[-1]
    assert line.split() == ["oracle", "2.00", "1.50x", "3.00", "ms", "4.00", "ms"]


def test_bench_oracle_has_the_tau_that_was_asked_for():
    """A probability that does not give its tau: 1 + p + .. + p^(K-1), checked by drawing."""
    for tau in (1.5, 4.0, 12.0):
        p = probability_for(tau, K)
        generator = torch.Generator().manual_seed(0)
        right = torch.rand(20000, K - 1, generator=generator) < p
        accepted = right.long().cumprod(-1).sum(-1)
        assert abs(1 + accepted.double().mean() - tau) < 0.1


def test_bench_oracle_of_many_answers():
    """An oracle that guesses the answer of another slot's prompt."""
    target = small_target()
    oracle = drafters.Oracle(target, prompts=2)
    oracle.learn([1] * 5, list(range(10, 40)), 1.0, 0)
    oracle.learn([1] * 8, list(range(50, 80)), 1.0, 1)
    # anchors: token 3 of the second answer, and token 1 of the first
    logits = oracle.draft_logits(torch.tensor([53, 11]), target, None, torch.tensor([11, 6]))
    assert logits.argmax(-1).tolist() == [list(range(54, 69)), list(range(12, 27))]


@pytest.mark.parametrize("p", (0.0, 0.5, 0.9, 1.0))
def test_bench_oracle_is_right_as_often_as_asked(p):
    """An oracle that is right more often or seldomer than it was told, or at other positions: the
    points of the curve then stand at another tau."""
    target = small_target()
    oracle = drafters.Oracle(target)
    answer = tokens_of(400).tolist()
    oracle.learn([1] * 30, answer, p)
    right = 0
    for first in range(0, 375, K - 1):
        logits = oracle.draft_logits(torch.tensor([1]), target, None, torch.tensor([29 + first]))
        guesses = logits.argmax(-1)[0].tolist()
        right += sum(a == b for a, b in zip(guesses, answer[first:first + K - 1], strict=True))
    assert right / 375 == pytest.approx(p, abs=0.08)


# ------------------------------------------------------------------------------------------------
# what is measured besides


def test_bench_untrained_drafter_costs_what_that_of_phase_1_2_costs():
    """A drafter of another size or with other features, whose rounds cost less or more."""
    with torch.device("meta"):
        config, _ = phase_1_2()
        drafter = drafters.untrained_drafter(Target(config).bfloat16())
    assert sum(p.numel() for p in drafter.parameters()) == 86_522_368
    assert drafter.target_layer_ids == (3, 7, 11, 15, 19)
    assert (drafter.block_size, drafter.mask_token_id) == (16, 248_319)
    assert drafter.fc.weight.dtype == torch.float32  # it is trained; random_drafter() casts it


@pytest.mark.parametrize("limit, room", ((5, 5), (100, 50 - 20 - K)))
def test_bench_peer_ends_where_we_end(limit, room):
    """An answer of transformers that goes on where ours ended: the two are called different."""
    asked = {}

    class Peer:
        config = SimpleNamespace(max_position_embeddings=50)
        device = "cpu"

        def generate(self, prompt, **options):
            asked.update(options)
            return torch.cat((prompt, torch.tensor([[7, 8]])), 1)

    prompt = tokens_of(20).tolist()
    assert peer_answer(Peer(), prompt, limit, {9, 3}, K) == [7, 8]
    assert asked["max_new_tokens"] == room
    assert asked["eos_token_id"] == [3, 9]
    assert asked["do_sample"] is False


# ------------------------------------------------------------------------------------------------
# pictures


def test_bench_throughput(run_bench, monkeypatch, tmp_path):
    """A row of another number of slots; a tau that is not that of the prompts, or not that of the
    oracle where the weights are random; no picture."""
    monkeypatch.setattr(throughput, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(throughput, "race", race_by_hand)
    args = ("throughput", "--limit=3", "--max_new_tokens=24")
    report = run_bench(*args, "--slots=1,2")
    target, tokenizer = nano()
    lengths = []
    for question, _ in load_questions("nano", 3):
        ids = chat_prompt(tokenizer, question)
        rounds = list(generate(target, shipped(), ids, 24, stop_ids(tokenizer)))
        lengths += [len(one_round.tokens) for one_round in rounds[1:]]
    for row, slots in zip(report["rows"], (1, 2), strict=True):
        assert row["slots"] == slots
        assert row["tau"] == sum(lengths) / len(lengths)
        assert row["decoded_tokens_per_s"] > 0
    floor = report["floor_seconds"]
    assert floor["target"] == floor["target_same_shape"] == report["bytes"]["step"] / 1e9
    assert floor["speculative"] == report["bytes"]["round"] / 1e9
    assert (tmp_path / "throughput.png").stat().st_size > 1000

    row, = run_bench(*args, "--slots=2", "--drafter=random", "--assumed_tau=16")["rows"]
    assert row["tau"] == 23 / 2  # 23 tokens after the prompt's own, in rounds of 16 and 7
    with pytest.raises(SystemExit, match="at least one sequence"):
        run_bench(*args, "--slots=0")


def race_by_hand(arms):
    """Seconds of each arm, which are not measured but are those of arms with so many slots."""
    seconds = {}
    for name, milliseconds in (("one row", 1.0), ("block", 2.0), ("round", 4.0)):
        assert arms[name].args[0].is_active.all()
        seconds[name] = [milliseconds / 1e3] * 3
    return seconds


def test_bench_throughput_by_hand(capsys):
    """Tokens/s of one sequence for those of all, or a speedup over the slow arm; speculation that
    pays below the tau from which it does."""
    rows = []
    for slots, round_seconds in ((2, 0.01), (4, 0.04)):
        seconds = {"speculative": round_seconds, "target_same_shape": 0.008, "target": 0.005}
        row = {"slots": slots, "tau": 6.0, "memory_bytes": 5e6, "seconds": seconds}
        floor = {"speculative": 0.005, "target_same_shape": 0.004, "target": 0.0025}
        throughput.add_speeds(row, floor)
        rows.append(row)
    assert rows[0]["tokens_per_s"] == {
        "speculative": pytest.approx(1200), "target_same_shape": 250, "target": 400}
    assert rows[0]["times_floor"] == {"speculative": 2, "target_same_shape": 2, "target": 2}
    assert [row["speedup"] for row in rows] == pytest.approx([3, 0.75])
    assert [row["break_even_tau"] for row in rows] == pytest.approx([2, 8])
    assert throughput.verdict(rows) == (
        "Speculation does not pay at 4 slots: 0.75x, its tau of 6.00 is not above 8.00.")
    assert throughput.verdict(rows[:1]).startswith("Speculation pays at all these loads: 3.00x")
    throughput.print_rows(rows, with_head=True)
    *_, first, _ = capsys.readouterr().out.splitlines()
    words = first.replace("|", "").replace("x", "").split()
    assert [float(word.replace(",", "")) for word in words] == [
        2, 6, 1200, 600, 10, 2, 250, 8, 2, 400, 5, 2, 3, 2, 5]


def test_bench_memory_of_a_sequence_by_hand():
    """Memory that is counted for all slots, or that leaves out a part."""
    config = nano()[0].config
    sizes = []
    for slots in (1, 3):
        decoder = draft_decode.Decoder(nano()[0], shipped(), 256, K, Sampling(), slots)
        sizes.append(throughput.memory_bytes(decoder) / slots)
    assert sizes[0] == sizes[1]
    keys_and_values = 2 * 3 * config.num_key_value_heads * 256 * config.head_dim
    two_states = 2 * 9 * 4 * 32 * 32
    window = 9 * 2 * K * (3 * 128 + 8)
    convolution = 9 * 3 * 128 * (3 + K)
    c = shipped().config
    cache = 2 * c.num_hidden_layers * c.num_key_value_heads * 256 * c.head_dim
    assert sizes[0] == 4 * (keys_and_values + two_states + window + convolution + cache)


def test_bench_figures(config, tmp_path, monkeypatch):
    """A picture of a run that never was: what its rounds returned is not the target's answer to
    that prompt."""
    monkeypatch.chdir(ROOT)
    with open(os.path.join(ROOT, "benchmarks", "results", "acceptance_nano.json")) as f:
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
    for name in ("acceptance.png", "curve.png", "decoding.gif", "throughput.png"):
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
