"""bench.py speed, throughput, rollback: a roofline, rate, or reference is not what its name says
(failure 15)."""
import json
from types import SimpleNamespace

import pytest
import torch

import bench
from benchmarks import common, drafters, reference, rollback, speed, throughput, timing
from target import Target
from tests.common import (HIDDEN, K, V, nano, phase_1_2, shipped, small_drafter, small_target,
                          tokens_of)
from training.flops import delta_rule_operations, prefill_operations


def test_clocks_by_hand(monkeypatch):
    """The time of several calls is taken for one, a warm-up counts, functions do not alternate, or
    the mean counts instead of the median. Each call takes 2 s."""
    now = [0.0]
    calls = []

    def call():
        now[0] += 2.0

    def timed(name):
        def measure():
            calls.append(name)
            return float(len(calls) ** 2)
        return measure

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    assert timing.seconds_of(call, 3) == 2.0
    seconds = timing.median_seconds({"a": timed("a"), "b": timed("b")}, repeats=3)
    assert calls == ["b", "a", "a", "b", "b", "a", "a", "b"]
    assert seconds == {"a": 36.0, "b": 25.0}  # of 9, 36, 49 and of 16, 25, 64


def test_rates_by_hand(monkeypatch):
    """A copy's reads or its writes are not counted, or a multiply-add is one operation."""
    monkeypatch.setattr(timing, "median_seconds", lambda functions: {"copy": 0.5, "product": 0.25})
    assert timing.best_rates("cpu", "float32") == {
        "GB/s": 2 * (256 << 20) / 0.5 / 1e9, "GFLOP/s": 2 * 1024 * 1024 * 3584 / 0.25 / 1e9}


def test_speed_rows_by_hand(run_bench, monkeypatch, capsys):
    """A roofline, rate, or ratio is upside down."""
    seconds = {"ours": 0.002, "reference": 0.006}
    monkeypatch.setattr(speed, "median_seconds", lambda functions: {
        name: seconds[name] for name in functions})
    monkeypatch.setattr(speed, "best_rates", lambda *args: {"GB/s": 4.0, "GFLOP/s": 12.0})
    monkeypatch.setattr(speed, "cases", lambda *args: [
        ("step", 4e6, "GB/s", {"ours": None, "reference": None}),
        ("prompt", 12e6, "GFLOP/s", {"ours": None})])
    step, prompt = run_bench("speed", "--limit=1")["rows"]
    assert step == {
        "name": "step", "seconds": 0.002, "rate": 2.0, "unit": "GB/s", "times_roofline": 2.0,
        "reference_seconds": 0.006, "ratio": 3.0}
    assert prompt == {"name": "prompt", "seconds": 0.002, "rate": 6.0, "unit": "GFLOP/s",
                      "times_roofline": 2.0}
    common.print_table([step, prompt], ("name", "rate", "ratio"))
    assert capsys.readouterr().out == (
        "| name | rate | ratio |\n|---|---|---|\n| step | 2 | 3 |\n| prompt | 6 |  |\n")


def test_speed_decoding_compares_equal_work(monkeypatch):
    """A reference processes other tokens than ours; a roofline lacks the head, which a round reads
    twice, or has an untied embedding."""
    lengths = []
    timed = []

    def model(ids, **options):
        lengths.append(ids.shape[1])
        return SimpleNamespace(past_key_values=[])

    def timed_rounds(target, drafter, tokens_per_forward):
        timed.append((drafter, tokens_per_forward))

    model.device = "cpu"
    config = SimpleNamespace(device="cpu")
    monkeypatch.setattr(speed, "transformers_reference", lambda target: model)
    monkeypatch.setattr(speed, "timed_rounds", timed_rounds)
    monkeypatch.setattr(speed, "seconds_of", lambda function, count: function())
    for shape in ("tied", "untied"):
        target = small_target(shape)
        drafter = small_drafter()
        cases = list(speed.cases(config, target, drafter))
        head = 4 * V * HIDDEN
        layers = 4 * sum(p.numel() for p in target.layers.parameters()) + 4 * HIDDEN  # and the norm
        of_drafter = 4 * sum(p.numel() for p in drafter.parameters())
        assert [work for _, work, _, _ in cases] == [
            layers + head, layers + head, layers + 2 * head + of_drafter]
        assert timed[-3:] == [(None, 1), (None, K), (drafter, K)]
    for _, _, _, functions in cases[:2]:
        functions["reference"]()
    assert lengths[-3:] == [speed.CONTEXT, 1, K]


def test_speed_rounds_stay_in_their_buffer(monkeypatch):
    """Rounds start where the last repeat ended, and run out of the buffer of 1,024 tokens."""
    starts = []

    def seconds_of(run_round, count):
        starts.append(run_round.__self__.state.position.tolist())
        run_round()

    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    timed = speed.timed_rounds(nano()[0], shipped(), K, slots=2)
    timed()
    timed()
    assert starts == [[speed.CONTEXT] * 2] * 2
    assert speed.CONTEXT + (speed.CALLS + 1) * K <= 1024


def test_speed_ttft_by_hand(monkeypatch):
    """TTFT excludes the choice of the next token, or has fewer operations."""
    target, _ = nano()
    monkeypatch.setattr(speed, "seconds_of", lambda function, count=1: function())
    monkeypatch.setattr(speed, "timed_rounds", lambda *args: None)
    with torch.inference_mode():
        cases = speed.cases(SimpleNamespace(device="cpu"), target, shipped())
        name, work, _, functions = list(cases)[3]
        ids = torch.tensor([speed.example_ids(512)])
        model = reference.transformers_reference(target)
        first = model(ids).logits[0, -1].argmax().item()
        assert functions["ours"]() == functions["reference"]() == first
    assert name == "TTFT, 512 tokens"
    assert work == prefill_operations(target, 512, chunk=16)


def test_speed_operations_of_the_delta_rule_by_hand():
    """A product is left out or counted half, or a last chunk is not padded: 5 tokens in chunks of
    4, three heads, keys of 2 numbers and values of 3."""
    k_k = Y = P = 2 * 4 * 4 * 2
    solve = 4 * 4 * 4
    U = P_W = 2 * 4 * 4 * 3
    W = next_S = q_S = 2 * 4 * 2 * 3
    of_chunk = k_k + solve + U + Y + P + W + next_S + q_S + P_W
    assert delta_rule_operations(5, heads=3, D=2, Dv=3, chunk=4) == 3 * 2 * of_chunk


def test_speed_operations_of_a_prompt_by_hand():
    """The count includes the embedding, the head for every token, or attention to later tokens: 10
    tokens, two full layers and six linear ones."""
    target = small_target("untied")
    matrices = 0
    for p in target.layers.parameters():
        if p.dim() == 2:
            matrices += p.numel()
    pairs = 55
    attention = pairs * 4 * (2 * 32 + 2 * 32)  # 4 heads of 32: a score and a sum
    delta_rule = delta_rule_operations(10, heads=8, D=16, Dv=24, chunk=16)
    head = 2 * 300 * 64
    assert prefill_operations(target, 10, chunk=16) == (
        2 * matrices * 10 + 2 * attention + 6 * delta_rule + head)


@pytest.mark.parametrize("p", (0.0, 0.5, 1.0))
def test_oracle_is_right_with_its_probability(p):
    """An oracle is right more or less often, or guesses the answer to a different prompt."""
    target = small_target()
    oracle = drafters.Oracle(target, prompts=2)
    answers = tokens_of(2, 400).tolist()
    for number, length in enumerate((30, 8)):
        oracle.learn([1] * length, answers[number], p, number)
    right = 0
    for first in range(0, 375, K - 1):
        anchors = torch.tensor([answer[first] for answer in answers])
        position = torch.tensor([30 + first, 8 + first])
        logits = oracle.draft_logits(anchors, target, None, position)
        for guesses, answer in zip(logits.argmax(-1).tolist(), answers, strict=True):
            expected = answer[first + 1:first + K]
            right += sum(a == b for a, b in zip(guesses, expected, strict=True))
    assert right / 750 == pytest.approx(p, abs=0.08)


def test_untrained_drafter_has_the_shape_of_phase_1_2():
    """A drafter of a different size or with different features takes a different time."""
    with torch.device("meta"):
        config, _ = phase_1_2()
        drafter = drafters.random_drafter(Target(config).bfloat16(), block_size=K)
    assert sum(p.numel() for p in drafter.parameters()) == 86_522_368
    assert drafter.target_layer_ids == (3, 7, 11, 15, 19)
    assert (drafter.block_size, drafter.mask_token_id) == (16, 248_319)


def test_throughput(main, monkeypatch, tmp_path):
    """A row has the time of a different mode or number of slots; tokens/s of one sequence are taken
    for those of all; the slower mode is called better; a picture is missing."""
    def timed_rounds(target, drafter, tokens_per_forward, slots):
        assert tokens_per_forward == (1 if drafter is None else K)
        return lambda: 0.005 if drafter is None else 0.01 * slots

    monkeypatch.setattr(throughput, "timed_rounds", timed_rounds)
    lines = main(bench, "throughput", "--slots=1,4", "--assumed_tau=6",
                 f"--out_dir={tmp_path}").splitlines()
    assert ("sequences: 1 | step 5.00 ms, 200 tokens/s | round 10.00 ms, 600 tokens/s | "
            "break-even tau 2.00 | better: with the drafter, 3.00x") in lines
    assert ("sequences: 4 | step 5.00 ms, 800 tokens/s | round 40.00 ms, 600 tokens/s | "
            "break-even tau 8.00 | better: the target alone, 1.33x") in lines
    assert [row["slots"] for row in json.loads(lines[-1])["rows"]] == [1, 4]
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_rollback(run_bench, monkeypatch):
    """A snapshot or a commit whose state contains rejected guesses, or a replay that forgets; a
    size of a different state."""
    def median_seconds(functions):
        for function in functions.values():
            function.args[0]()
        return dict.fromkeys(functions, 0.25)

    monkeypatch.setattr(rollback, "median_seconds", median_seconds)
    rows = run_bench("rollback", "--slots=2", "--prompts=random:32:32")["rows"]
    S = 9 * 4 * 32 * 32 * 4 / 1e6  # layers, heads, widths, bytes
    places = [row["mb_per_sequence"] / S for row in rows]
    assert places == pytest.approx([1 + K, 1, places[2]])
    assert 2 < places[2] < 6  # two S, and the inputs of 32 tokens
    assert [row["syncs_before_commit"] for row in rows] == [0, 1, 0]
    for row in rows:
        assert (row["sequences"], row["ms_per_round"], row["equal_choices"]) == (2, 250, 1)
        assert row["equal_logits"] == 1 or row["way"] == "replay"
