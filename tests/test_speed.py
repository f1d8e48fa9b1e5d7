"""bench.py speed: a row whose floor, rate or peer is not what it says (failure 15)."""
import inspect
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import transformers
from torch.autograd import DeviceType
from transformers.integrations.hub_kernels import use_kernel_func_from_hub_with_fallback
from transformers.models.qwen3_5 import modeling_qwen3_5

import bench
from benchmarks import peer as peers
from benchmarks import speed, speed_table, timing
from benchmarks.machine import bytes_read
from benchmarks.speed_table import Work, report_row
from configurator import configure
from training.flops import delta_rule_operations, prefill_operations
from delta_rule import gated_delta_rule
from tests.common import K, nano, shipped, small_target, tokens_of

PLAIN = f"transformers {transformers.__version__}, its plain torch kernels"


@pytest.fixture
def config():
    """The keys of bench.py at their defaults, for a CPU."""
    config = configure(vars(bench), [])
    config.device = "cpu"
    config.dtype = "float32"
    return config


@pytest.fixture
def rates(monkeypatch):
    """A machine that copies 1 GB a second and makes 1e9 operations a second."""
    monkeypatch.setattr(speed, "copy_bandwidth", lambda device: 1e9)
    monkeypatch.setattr(speed, "product_rate", lambda device, dtype: 1e9)


@pytest.fixture
def fla(monkeypatch):
    """A package fla whose chunked delta rule is ours. It refuses a backward pass."""
    def chunk_gated_delta_rule(q, k, v, g, beta, output_final_state=False):
        if torch.is_grad_enabled():
            raise RuntimeError("Triton 3.5\non Hopper")
        return gated_delta_rule(q, k, v, g, beta)

    chunk_gated_delta_rule.__module__ = "fla.ops.gated_delta_rule.chunk"
    for name in ("fla", "fla.ops", "fla.ops.gated_delta_rule"):
        module = ModuleType(name)
        module.__path__ = []
        monkeypatch.setitem(sys.modules, name, module)
    sys.modules["fla"].__version__ = "0.6.0"
    sys.modules["fla.ops.gated_delta_rule"].chunk_gated_delta_rule = chunk_gated_delta_rule
    return chunk_gated_delta_rule


# ------------------------------------------------------------------------------------------------
# the table


def test_speed_row_by_hand():
    """A floor, rate or ratio that is upside down, or taken from another repeat than the median."""
    row = report_row("step", [1.0, 4.0, 2.0], Work(6e9, "bytes", 12e9), "peer", [3.0, 4.0, 8.0])
    assert row == {"name": "step", "seconds": 2.0, "floor_seconds": 0.5, "bytes_per_s": 3e9,
                   "peer": "peer", "peer_seconds": 4.0, "ratio": 3.0}
    row = report_row("rule", [0.5], Work(6e9, "operations", 24e9))
    assert row == {"name": "rule", "seconds": 0.5, "floor_seconds": 0.25,
                   "operations_per_s": 12e9, "peer": None, "peer_seconds": None, "ratio": None}


def test_speed_table_prints_its_figures(capsys):
    """Columns that are exchanged, or figures that are a thousand times too many; a peer that did
    not run and does not say so."""
    step = report_row("step", [0.002], Work(4e6, "bytes", 4e9), "transformers", [0.005])
    step |= {"kernel_seconds": 0.0016, "kernels": 1572}
    rule = report_row("rule", [0.5], Work(3e12, "operations", 12e12), "fla, which refuses: no")
    speed_table.print_table([step, rule])
    _, step_line, rule_line, kernel_line = capsys.readouterr().out.splitlines()
    assert step_line.split() == [
        "step", "2.000", "2.00", "2.00", "GB/s", "5.000", "2.50x", "transformers"]
    assert rule_line.split() == [
        "rule", "500.000", "2.00", "6.00", "TFLOP/s", "-", "-", "fla,", "which", "refuses:", "no"]
    assert kernel_line == "step: 1,572 kernels take 1.600 ms; the whole takes 25.0% more"


def test_speed_compares_a_token_with_a_token(run_bench, rates, monkeypatch):
    """The time of a round, which makes several tokens, set against one token of another program; a
    rate that is not that of the bytes read; kernels counted where no device has any."""
    seconds = {"one row": [1.0], "block": [2.0], "round": [4.0], "peer, one token": [3.0],
               "peer, a block": [5.0], "peer, generate": [6.0]}
    monkeypatch.setattr(speed, "race", lambda arms: {name: seconds[name] for name in arms})
    report = run_bench("speed", "--parts=decoding", "--assumed_tau=8", "--limit=1")
    step, block, whole_round, token = report["rows"]
    assert (step["seconds"], step["ratio"]) == (1.0, 3.0)
    assert (block["seconds"], block["ratio"]) == (2.0, 2.5)
    assert (whole_round["seconds"], whole_round["peer"]) == (4.0, None)
    assert (token["seconds"], token["ratio"]) == (0.5, 12.0)
    assert "tau 8" in token["name"]
    assert token["floor_seconds"] == whole_round["floor_seconds"] / 8
    target, _ = nano()
    size = bytes_read(target, shipped())
    assert (step["bytes_per_s"], block["bytes_per_s"]) == (size["step"], size["step"] / 2)
    assert whole_round["bytes_per_s"] == token["bytes_per_s"] == size["round"] / 4
    assert step["peer"] == f"{PLAIN}, forward of one token"
    for row in report["rows"]:
        assert "kernel_seconds" not in row
    for flag, hint in (("--assumed_tau=0", "at least one token"), ("--parts=memory", "is none of")):
        with pytest.raises(SystemExit, match=hint):
            run_bench("speed", flag)


def test_speed_of_the_peer_by_hand(monkeypatch):
    """The time of many tokens of transformers taken for that of one."""
    def peer(tokens, **options):
        return SimpleNamespace(past_key_values=[])

    monkeypatch.setattr(speed, "seconds_of", lambda function, count=1: 8.0 / count)
    arms = speed.peer_arms(peer, tokens_of(1, speed.CONTEXT + K), K, count=4)
    assert {name: arm() for name, arm in arms.items()} == {
        "peer, one token": 2.0, "peer, a block": 2.0, "peer, generate": 2.0}


def test_speed_of_the_first_token_by_hand(config, monkeypatch):
    """The time of a prompt without the choice of its token, on either side; that of the target
    alone for that with a drafter; a floor of other operations."""
    target, _ = nano()
    drafter = shipped()
    workload = SimpleNamespace(target=target, drafter=drafter)
    model = peers.transformers_peer(target)
    returned = []

    def seconds_of(function):
        returned.append(function())

    def race(arms):
        assert arms["target"].args[0].drafter is None
        assert arms["with drafter"].args[0].drafter is drafter
        for arm in arms.values():
            arm()
        return {"target": [1.0, 3.0, 2.0], "with drafter": [8.0] * 3, "peer": [4.0] * 3}

    monkeypatch.setattr(speed, "seconds_of", seconds_of)
    monkeypatch.setattr(speed, "race", race)
    alone, with_drafter = speed.prefill_rows(config, workload, model, rate=1e6)
    first = model(torch.arange(512)[None] % target.config.vocab_size).logits[0, -1].argmax().item()
    assert returned == [first] * 3
    operations = prefill_operations(target, 512, chunk=16)
    assert alone["name"] == "time to the first token, 512 tokens"
    assert with_drafter["name"] == "time to the first token, 512 tokens, with drafter"
    assert (alone["seconds"], alone["ratio"]) == (2.0, 2.0)
    assert (with_drafter["seconds"], with_drafter["ratio"]) == (8.0, 0.5)
    for row in (alone, with_drafter):
        assert row["floor_seconds"] == operations / 1e6
        assert row["operations_per_s"] == operations / row["seconds"]
        assert (row["peer"], row["peer_seconds"]) == (PLAIN, 4.0)


def test_speed_of_training(run_bench, rates):
    """A training row whose tokens, samples or operations are not those of its steps."""
    row, = run_bench("speed", "--parts=training", "--limit=1")["rows"]
    assert row["tokens_per_s"] == pytest.approx(512 * row["samples_per_s"])
    assert row["seconds"] > 0
    assert row["mfu"] is None
    assert row["floor_seconds"] > 1
    # floor and rate are of the same operations; every step has one sample
    assert row["operations_per_s"] == pytest.approx(
        1e9 * row["floor_seconds"] * row["samples_per_s"])


# ------------------------------------------------------------------------------------------------
# operations


def test_speed_operations_of_the_delta_rule_by_hand():
    """A product that is left out or counted half, or a last chunk that is not padded: 5 tokens in
    chunks of 4, three heads, keys of 2 numbers and values of 3."""
    k_k = 2 * 4 * 4 * 2
    solve = 4 * 4 * 4
    U = 2 * 4 * 4 * 3
    Y = 2 * 4 * 4 * 2
    P = 2 * 4 * 4 * 2
    W = 2 * 4 * 2 * 3
    next_S = 2 * 4 * 2 * 3
    q_S = 2 * 4 * 2 * 3
    P_W = 2 * 4 * 4 * 3
    of_chunk = k_k + solve + U + Y + P + W + next_S + q_S + P_W
    assert delta_rule_operations(5, heads=3, D=2, Dv=3, chunk=4) == 3 * 2 * of_chunk


def test_speed_operations_of_a_prompt_by_hand():
    """A floor of prefill with the embedding in it, with the head for every token, or with attention
    to tokens that come later: 10 tokens, two full layers and six linear ones."""
    target = small_target("untied")
    matrices = 0
    for p in target.layers.parameters():
        if p.dim() == 2:
            matrices += p.numel()
    pairs = 55
    attention = pairs * 4 * (2 * 32 + 2 * 32)  # 4 heads of 32: a score and a sum
    delta_rule = delta_rule_operations(10, heads=8, D=16, Dv=16, chunk=16)
    head = 2 * 300 * 64
    assert prefill_operations(target, 10, chunk=16) == (
        2 * matrices * 10 + 2 * attention + 6 * delta_rule + head)


# ------------------------------------------------------------------------------------------------
# peers


def test_speed_names_the_kernels_that_transformers_runs(fla, monkeypatch):
    """A peer named after a package that is there and does not run, or named plain where it runs
    another's kernels; a transformers that cannot be read passed off as plain."""
    assert peers.transformers_name() == PLAIN

    def chosen(package):
        def implementation():
            pass
        implementation.__module__ = f"{package}.some.file"
        torch_function = "unused"

        def function():
            return implementation, torch_function
        return function

    sys.modules["fla"].__version__ = "0.6.0"
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", chosen("fla"))
    with_fla = f"transformers {transformers.__version__} with flash-linear-attention 0.6.0"
    assert peers.transformers_name() == with_fla

    conv = ModuleType("causal_conv1d")
    conv.__version__ = "1.7.0"
    monkeypatch.setitem(sys.modules, "causal_conv1d", conv)
    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", chosen("causal_conv1d"))
    assert peers.transformers_name() == f"{with_fla} and causal-conv1d 1.7.0"

    monkeypatch.setattr(modeling_qwen3_5, "causal_conv1d_fn", lambda: None)
    with pytest.raises(ValueError, match="install 5.17"):
        peers.transformers_name()


def test_speed_reads_transformers_choice_where_it_is_made(fla):
    """transformers' own decorator with fla at hand: a name that is not read from what it chose, or
    its plain kernel lost behind that choice. Wrapped as the package `kernels` does it, too."""
    def plain(q, k, v, g, beta):
        pass

    decorate = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    function = decorate(plain)

    def wrapped(func):
        class Module(torch.nn.Module):
            def forward(self, *args):
                return func(*args)
        return Module()

    for form in (function, wrapped(function)):
        choice = peers.kernel_choice(form)
        assert choice["implementation"] is fla
        assert choice["torch_function"] is plain


def test_speed_peers_of_the_delta_rule(fla, monkeypatch, capsys):
    """fla left out on a GPU or tried on a CPU; transformers' kernel that is not its plain one; a
    peer of other shapes, scale or result."""
    plain_kernel = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    decorate = use_kernel_func_from_hub_with_fallback("chunk_gated_delta_rule", "fla")
    monkeypatch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", decorate(plain_kernel))
    plain_name = f"transformers {transformers.__version__}, its plain torch kernel"
    assert list(peers.delta_rule_peers("cpu")) == [plain_name]
    both = peers.delta_rule_peers("cuda")
    assert list(both) == [plain_name, "flash-linear-attention 0.6.0"]
    assert both["flash-linear-attention 0.6.0"].func is fla
    plain = both[plain_name]
    assert plain.func is plain_kernel

    inputs = speed.delta_rule_inputs(40, "cpu", "float32")
    for output, expected in zip(plain(*inputs), gated_delta_rule(*inputs), strict=True):
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4)

    monkeypatch.setitem(sys.modules, "fla", None)  # what Python does with a package that is absent
    monkeypatch.setitem(sys.modules, "fla.ops.gated_delta_rule", None)
    assert list(peers.delta_rule_peers("cuda")) == [plain_name]
    assert "without flash-linear-attention" in capsys.readouterr().out


def test_speed_of_the_delta_rule_by_hand(fla, config, monkeypatch):
    """A peer whose row is missing or has another's time; a refusal that ends the command, or has a
    time; operations of the forward alone for both passes."""
    real_inputs = speed.delta_rule_inputs
    lengths = []

    def short_inputs(length, device, dtype):
        lengths.append(length)
        return real_inputs(32, "cpu", dtype)

    def race(arms):
        seconds = {}
        for name in arms:
            seconds[name] = [{"o": 2.0, "t": 8.0, "f": 1.0}[name[0]]]
        return seconds

    monkeypatch.setattr(speed, "delta_rule_inputs", short_inputs)
    monkeypatch.setattr(speed, "race", race)
    config.device = "cuda"
    config.dtype = "bfloat16"
    rows = speed.kernel_rows(config, rate=1e9)
    assert lengths == [512, 2048, 4096, 16384]
    assert len(rows) == 4 * 2 * 2

    plain, with_fla, plain_backward, refused = rows[:4]
    assert plain["name"] == with_fla["name"] == "delta rule, 512 tokens, forward"
    assert plain["peer"].endswith("its plain torch kernel")
    assert (plain["seconds"], plain["peer_seconds"], plain["ratio"]) == (2.0, 8.0, 4.0)
    assert with_fla["peer"] == "flash-linear-attention 0.6.0"
    assert (with_fla["peer_seconds"], with_fla["ratio"]) == (1.0, 0.5)
    assert refused["peer"] == (
        "flash-linear-attention 0.6.0, which refuses: Triton 3.5 on Hopper")
    assert refused["peer_seconds"] is None
    operations = delta_rule_operations(512, 16, 128, 128, chunk=64)
    assert plain["operations_per_s"] == operations / 2
    assert plain_backward["operations_per_s"] == 3 * operations / 2
    assert plain_backward["floor_seconds"] == 3 * operations / 1e9


def test_speed_inputs_of_the_delta_rule_are_a_models():
    """bfloat16 for the log of the fading, which is fp32 in the model, or fp32 for the others."""
    q, k, v, g, beta = speed.delta_rule_inputs(8, "cpu", "bfloat16")
    for x in (q, k, v, beta):
        assert x.dtype == torch.bfloat16
    assert g.dtype == torch.float32
    assert g.max() <= 0
    torch.testing.assert_close(k.float().norm(dim=-1), torch.ones(1, 8, 16), atol=1e-2, rtol=0)


# ------------------------------------------------------------------------------------------------
# kernels


def device_event(microseconds, device_type=DeviceType.CUDA, is_user_annotation=False):
    return SimpleNamespace(self_device_time_total=microseconds, device_type=device_type,
                           is_user_annotation=is_user_annotation)


def test_speed_kernel_time_by_hand(monkeypatch):
    """Launches or annotations counted as kernels, the time of all calls for that of one, or the
    first start of the tracer, which misses kernels."""
    kernel = device_event(30.0)
    launch = device_event(500.0, DeviceType.CPU)
    annotation = device_event(70.0, is_user_annotation=True)
    traces = [[kernel], [kernel, launch, kernel, annotation, kernel, kernel]]
    calls = []

    class Profile:
        def __init__(self, activities):
            assert activities == [torch.profiler.ProfilerActivity.CUDA]
            self.trace = traces.pop(0)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

        def events(self):
            return self.trace

    monkeypatch.setattr(timing, "profile", Profile)
    seconds, kernels = timing.kernel_time(lambda: calls.append(1), 2)
    assert (seconds, kernels) == (pytest.approx(60e-6), 2)
    assert len(calls) == 4
    traces.extend([[launch], [launch]])
    assert timing.kernel_time(lambda: None, 2) is None


def test_speed_kernels_stand_beside_their_row(config, monkeypatch):
    """Kernels of a round beside the time of a step; a round that runs out of its buffer."""
    target, _ = nano()
    workload = SimpleNamespace(target=target, drafter=shipped())
    kernels_of_rows = {(1, False): 100, (K, False): 200, (K, True): 300}

    def kernel_time(run_round, count):
        decoder = run_round.__self__
        assert (decoder.state.position == speed.CONTEXT).all()
        assert speed.CONTEXT + 2 * count * K + K <= decoder.state.length
        return 0.5, kernels_of_rows[decoder.state.tokens_per_forward, decoder.drafter is not None]

    def race(arms):
        for name in ("one row", "block", "round"):
            arms[name].args[0].state.position.fill_(700)  # where repeats left it
        return dict.fromkeys(arms, [1.0])

    monkeypatch.setattr(speed, "kernel_time", kernel_time)
    monkeypatch.setattr(speed, "peer_arms", lambda *args: dict.fromkeys(
        ("peer, one token", "peer, a block", "peer, generate")))
    monkeypatch.setattr(speed, "race", race)
    config.device = "cuda"
    rows = speed.decoding_rows(config, workload, None, bandwidth=1e9)
    assert [row.get("kernels") for row in rows] == [100, 200, 300, None]
    assert [row.get("kernel_seconds") for row in rows] == [0.5, 0.5, 0.5, None]
    monkeypatch.setattr(speed, "kernel_time", lambda *args: None)
    rows = speed.decoding_rows(config, workload, None, bandwidth=1e9)
    assert "kernels" not in rows[0]
