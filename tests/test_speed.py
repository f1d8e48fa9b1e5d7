"""bench.py speed, throughput, rollback: a roofline, rate, or reference is not what its name says
(failure 15)."""
import contextlib
import inspect
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch.autograd import DeviceType
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import bench
from benchmarks import common, drafters, reference, rollback, speed, throughput, timing
from benchmarks.speed import Case
from delta_rule import gated_delta_rule
from target import Target
from tests.common import (HIDDEN, K, V, nano, phase_1_2, shipped, small_drafter, small_target,
                          tokens_of)
from training.flops import delta_rule_operations, prefill_operations

TRANSFORMERS = f"transformers {transformers.__version__}"


@pytest.fixture
def config():
    return SimpleNamespace(device="cpu", dtype="float32")


@pytest.fixture
def fla(monkeypatch):
    """A package fla whose chunked delta rule is ours."""
    def chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=False):
        return gated_delta_rule(q, k, v, g, beta)

    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["fla"].__version__ = "0.6.0"
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    return chunk_gated_delta_rule


def test_clocks_by_hand(monkeypatch):
    """The time of several calls is taken for one, a warm-up counts, or functions do not alternate.
    Each call takes 2 s."""
    now = [0.0]
    calls = []

    def call():
        now[0] += 2.0

    def timed(name):
        def measure():
            calls.append(name)
            return float(len(calls))
        return measure

    monkeypatch.setattr(timing, "clock", lambda: now[0])
    assert timing.seconds_of(call, 3) == 2.0
    seconds = timing.time_interleaved({"a": timed("a"), "b": timed("b")}, repeats=2)
    assert calls == ["b", "a", "a", "b", "b", "a"]
    assert seconds == {"a": [3.0, 6.0], "b": [4.0, 5.0]}


def test_rates_by_hand(monkeypatch):
    """A copy's reads or its writes are not counted, or a multiply-add is one operation."""
    monkeypatch.setattr(timing, "time_interleaved",
                        lambda functions: dict.fromkeys(functions, [9.0, 0.5, 0.1]))
    assert timing.copy_bandwidth("cpu") == 2 * (256 << 20) / 0.5
    assert timing.product_rate("cpu", "float32") == 2 * 1024 * 1024 * 3584 / 0.5


def test_kernel_time_by_hand(monkeypatch):
    """Launches or annotations count as kernels, the time of all calls is taken for one, or the
    profiler's first run counts, which misses kernels."""
    def event(microseconds, device_type=DeviceType.CUDA, is_user_annotation=False):
        return SimpleNamespace(self_device_time_total=microseconds, device_type=device_type,
                               is_user_annotation=is_user_annotation)

    kernel = event(30.0)
    launch = event(500.0, DeviceType.CPU)
    annotation = event(70.0, is_user_annotation=True)
    traces = [[kernel], [kernel, launch, kernel, annotation, kernel, kernel], [launch], [launch]]

    def profile(activities):
        assert activities == [torch.profiler.ProfilerActivity.CUDA]
        trace = traces.pop(0)
        return contextlib.nullcontext(SimpleNamespace(events=lambda: trace))

    monkeypatch.setattr(timing, "profile", profile)
    measured = timing.kernel_time(lambda: None, 2)
    assert measured == {"kernel_seconds": pytest.approx(60e-6), "kernels": 2}
    assert timing.kernel_time(lambda: None) == {}


def test_speed_rows_by_hand(monkeypatch, capsys):
    """A roofline, rate, or ratio is upside down, or a time belongs to a different row."""
    seconds = {"ours": [0.001, 0.004, 0.002], "reference": [0.003, 0.004, 0.008]}
    monkeypatch.setattr(speed, "time_interleaved", lambda functions: {
        name: seconds[name] for name in functions})
    best_rates = {"GB/s": 4.0, "GFLOP/s": 12.0}
    case = Case("step", 4e6, "GB/s", lambda: 0.016, 10, "theirs", lambda: None)
    row = {"name": "step", "seconds": 0.002, "rate": 2.0, "unit": "GB/s", "times_roofline": 2.0,
           "reference": "theirs", "reference_seconds": 0.004, "ratio": 3.0}
    assert speed.measure(case, best_rates) == row
    rule = speed.measure(Case("rule", 12e6, "GFLOP/s", lambda: 0.4), best_rates)
    assert rule == {"name": "rule", "seconds": 0.002, "rate": 6.0, "unit": "GFLOP/s",
                    "times_roofline": 2.0}
    common.print_table([row, rule], ("name", "rate", "ratio"))
    assert capsys.readouterr().out == (
        "| name | rate | ratio |\n|---|---|---|\n| step | 2 | 3 |\n| rule | 6 |  |\n")


def test_speed_profiles_after_all_wall_clock_times(config, monkeypatch):
    """A wall-clock time is measured after the profiler, which slows every later replay of a CUDA
    graph down; a kernel time is in a different row or counts several calls as one."""
    events = []

    def time_interleaved(functions):
        events.append("clock")
        return {name: [1.0] for name in functions}

    def measure_steps(config, count):
        events.append("clock")
        return "run", {"seconds": 1.0}

    def kernel_time(function, calls):
        events.append("profiler")
        return {"kernel_seconds": function() / calls}

    for part, kernel_seconds in (("decoding", 4.0), ("prefill", 6.0), ("kernel", 8.0)):
        case = Case(part, 1.0, "GB/s", lambda seconds=kernel_seconds: seconds, 2)
        monkeypatch.setattr(speed, f"{part}_cases", lambda config, workload, case=case: [case])
    for name in ("copy_bandwidth", "product_rate"):
        monkeypatch.setattr(speed, name, lambda *args: events.append("clock") or 1e9)
    for name in ("load", "setup_of", "device_name", "prepare_training"):
        monkeypatch.setattr(speed, name, lambda *args, **options: "")
    for function in (time_interleaved, measure_steps, kernel_time):
        monkeypatch.setattr(speed, function.__name__, function)
    monkeypatch.setattr(speed.train, "train_step", lambda training_run: 1.0)
    config.device = "cuda"
    config.parts = ("decoding", "prefill", "training", "kernel")
    report, _ = speed.run(config)
    assert events == 6 * ["clock"] + 4 * ["profiler"]
    assert {row["name"]: row["kernel_seconds"] for row in report["rows"]} == {
        "decoding": 2.0, "prefill": 3.0, "kernel": 4.0, "training step": 1.0}


def test_speed_decoding_compares_equal_work(config, monkeypatch):
    """A reference processes other tokens than ours; a roofline lacks the head, which a round reads
    twice, or has an untied embedding."""
    lengths = []
    timed = []

    def model(ids, **options):
        lengths.append(ids.shape[1])
        return SimpleNamespace(past_key_values=[])

    def timed_rounds(target, drafter, tokens_per_forward, calls):
        timed.append((drafter, tokens_per_forward))

    model.device = "cpu"
    monkeypatch.setattr(speed, "transformers_reference", lambda target: model)
    monkeypatch.setattr(speed, "timed_rounds", timed_rounds)
    monkeypatch.setattr(speed, "seconds_of", lambda function, count: function())
    for shape in ("tied", "untied"):
        target = small_target(shape)
        drafter = small_drafter()
        cases = speed.decoding_cases(config, SimpleNamespace(target=target, drafter=drafter))
        head = 4 * V * HIDDEN
        layers = 4 * sum(p.numel() for p in target.layers.parameters()) + 4 * HIDDEN  # and the norm
        of_drafter = 4 * sum(p.numel() for p in drafter.parameters())
        assert [case.work for case in cases] == [
            layers + head, layers + head, layers + 2 * head + of_drafter]
        assert timed[-3:] == [(None, 1), (None, K), (drafter, K)]
    for case in cases[:2]:
        case.reference()
    assert lengths[-3:] == [speed.CONTEXT, 1, K]
    assert cases[2].reference is None


def test_speed_rounds_stay_in_their_buffer():
    """Rounds start where the last repeat ended, and run out of the buffer of 1,024 tokens."""
    timed = speed.timed_rounds(nano()[0], shipped(), K, 40, slots=2)
    assert all(timed() > 0 for _ in range(3))


def test_speed_ttft_by_hand(config, monkeypatch):
    """TTFT excludes the choice of the next token, or has fewer operations."""
    target, _ = nano()
    monkeypatch.setattr(speed, "seconds_of", lambda function: function())
    with torch.inference_mode():
        case = speed.prefill_cases(config, SimpleNamespace(target=target))[0]
        ids = torch.tensor([speed.example_ids(512)])
        model = reference.transformers_reference(target)
        first = model(ids).logits[0, -1].argmax().item()
        assert case.ours() == case.reference() == first
    assert case.work == prefill_operations(target, 512, chunk=16)


def test_speed_of_training(run_bench, monkeypatch):
    """A row has other samples than its steps; a part that does not exist is left out silently."""
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: 1e9)
    row, = run_bench("speed", "--parts=training", "--limit=1")["rows"]
    assert row["seconds"] > 0
    assert row["mfu"] is None
    assert row["samples_per_s"] == pytest.approx(8 / row["seconds"], rel=1)  # steps of 8 samples
    with pytest.raises(SystemExit, match="is not one of"):
        run_bench("speed", "--parts=memory")


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


def test_speed_references_of_the_delta_rule(config, fla, monkeypatch, capsys):
    """fla is left out on a GPU or tried on a CPU; transformers' kernel is not its plain one; a
    reference has a different name, shape, scale, or result."""
    plain_kernel = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    decorate = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", decorate(plain_kernel))
    plain_name = f"{TRANSFORMERS}, plain"
    both = reference.delta_rule_references("cuda")
    assert list(both) == [plain_name, "fla 0.6.0"]
    assert both["fla 0.6.0"].func is fla
    assert both[plain_name].func is plain_kernel
    assert list(reference.delta_rule_references("cpu")) == [plain_name]
    assert reference.transformers_name() == f"{TRANSFORMERS} with fla 0.6.0"

    inputs = speed.delta_rule_inputs(40, "cpu", "float32")
    outputs = both[plain_name](*inputs)
    for output, expected in zip(outputs, gated_delta_rule(*inputs), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)

    precisions = []  # of fp32 products while our kernel runs, as a bf16 target sets it

    def kernel(*inputs):
        precisions.append(torch.backends.cuda.matmul.fp32_precision)

    monkeypatch.setattr(speed, "gated_delta_rule", kernel)
    target = small_target(dtype=torch.bfloat16)
    case, = speed.kernel_cases(config, SimpleNamespace(target=target))
    case.ours()
    assert precisions == ["tf32"]
    assert case.reference_name == plain_name
    assert case.work == delta_rule_operations(2048, 16, 128, 128, chunk=64)

    for name in ("fla", "fla.ops.gated_delta_rule"):
        monkeypatch.setitem(sys.modules, name, None)  # Python then takes the package for missing
    assert reference.transformers_name() == TRANSFORMERS
    assert list(reference.delta_rule_references("cuda")) == [plain_name]
    assert "without flash-linear-attention" in capsys.readouterr().out


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
    def timed_rounds(target, drafter, tokens_per_forward, calls, slots):
        assert tokens_per_forward == (1 if drafter is None else K)
        return lambda: 0.005 if drafter is None else 0.01 * slots

    monkeypatch.setattr(throughput, "timed_rounds", timed_rounds)
    lines = main(bench, "throughput", "--slots=1,4", "--assumed_tau=6",
                 f"--out_dir={tmp_path}").splitlines()
    assert "| 1 | 5 | 200 | 10 | 600 | 2 |" in lines  # the target alone, rounds, break-even tau
    assert "| 4 | 5 | 800 | 40 | 600 | 8 |" in lines
    assert ("sequences: 1, better: with the drafter, 3.00x (tau 6.00, break-even 2.00)") in lines
    assert ("sequences: 4, better: the target alone, 1.33x (tau 6.00, break-even 8.00)") in lines
    assert [row["slots"] for row in json.loads(lines[-1])["rows"]] == [1, 4]
    assert (tmp_path / "throughput.png").stat().st_size > 1000


def test_rollback(run_bench, monkeypatch):
    """A snapshot or a commit whose state contains rejected guesses, or a replay that forgets; a
    size of a different state."""
    monkeypatch.setattr(rollback, "time_interleaved", lambda functions: {
        name: [functions[name](), 0.25, 0.25] for name in functions})
    rows = run_bench("rollback", "--slots=2")["rows"]
    S = 9 * 4 * 32 * 32 * 4 / 1e6  # layers, heads, widths, bytes
    places = [row["mb_per_sequence"] / S for row in rows]
    assert places == pytest.approx([1 + K, 1, places[2]])
    assert 2 < places[2] < 6  # two S, and the inputs of 32 tokens
    assert [row["syncs_before_commit"] for row in rows] == [0, 1, 0]
    for row in rows:
        assert (row["sequences"], row["ms_per_round"], row["equal_choices"]) == (2, 250, 1)
        assert row["equal_logits"] == 1 or row["way"] == "replay"
