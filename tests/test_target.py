"""
The target: its numbers against transformers, its sizes, and loading it from every layout.
"""
import copy
import dataclasses
import functools
import math
import subprocess
import sys

import huggingface_hub
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig

from fast import cpu
import target as target_module
from benchmarks.slips import slip
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint
from checkpoint import (SIZES, load_drafter, load_target, parse_target_config, random_target,
                        read_target_config)
from draft_decode import generate
from model import linear_product
from target import GatedRMSNorm, RMSNorm, Target, unit_length
from tests.common import (HIDDEN, LAYER_IDS, NANO_DRAFTER, NANO_TARGET, ROOT, apart,
                          hub_copy, nano, perturb, phase_1_2, public_weights, publish, questions,
                          random_normal, shipped, small_config, small_target, tokens_of)

FP32_NAMES = ("linear_attn.A_log", "linear_attn.norm.weight")  # in fp32 whatever the model's dtype

# ------------------------------------------------------------------------------------------------
# the same numbers as transformers


@functools.cache
def peer(shape):
    """A random Qwen3_5ForCausalLM of transformers, and our Target with its weights."""
    c = small_config(shape)
    keys = dict(vars(c))
    theta = keys.pop("rope_theta")
    keys.pop("partial_rotary_factor")
    keys["layer_types"] = list(c.layer_types)
    keys["rope_parameters"] = {
        "rope_type": "default", "rope_theta": theta, "partial_rotary_factor": 0.25,
        "mrope_section": [2, 1, 1]}
    torch.manual_seed(1)
    theirs = Qwen3_5ForCausalLM(Qwen3_5TextConfig(**keys))
    perturb(theirs, scale=5.0)

    weights = {}
    for name, weight in theirs.state_dict().items():
        weights[name.removeprefix("model.")] = weight
    if c.tie_word_embeddings:
        weights.pop("lm_head.weight", None)
    ours = Target(c).eval()
    ours.load_state_dict(weights)  # strict: the names are those of the public checkpoint
    return theirs, ours


def feature(features, index):
    """The part of features (B, T, layers * hidden) that one layer gave."""
    return features[..., HIDDEN * index:HIDDEN * (index + 1)]


@pytest.mark.parametrize("T", (1, 15, 16, 17, 63, 64, 65, 130))
@pytest.mark.parametrize("shape", ("tied", "untied"))
@torch.no_grad()
def test_target_equals_transformers(shape, T):
    """Failure 4: a feature is not the residual stream after its layer; and any departure of the
    target's own math."""
    theirs, ours = peer(shape)
    x = tokens_of(2, T, seed=T)
    reference = theirs(x, output_hidden_states=True)
    features, hidden = ours(x, target_layer_ids=LAYER_IDS)
    assert apart(ours.logits(hidden), reference.logits) < 1e-4
    for index, i in enumerate(LAYER_IDS):
        assert apart(feature(features, index), reference.hidden_states[i + 1]) < 1e-4, i
    # features alone: nothing above their last layer is run
    alone, nothing = ours(x, target_layer_ids=LAYER_IDS, features_only=True)
    assert torch.equal(alone, features)
    assert nothing is None


@torch.no_grad()
def test_nano_target_is_a_public_checkpoint():
    """Failure 10: the shipped target has another form than the public one, so that only this
    project can read it."""
    target, tokenizer = nano()
    theirs = Qwen3_5ForCausalLM.from_pretrained(NANO_TARGET, dtype=torch.float32).eval()
    x = torch.tensor([chat_prompt(tokenizer, questions()[0])])
    _, hidden = target(x)
    assert apart(target.logits(hidden), theirs(x).logits) < 1e-4
    assert sum(p.numel() for p in target.parameters()) < 5e6


@torch.no_grad()
def test_failure_4_features_of_a_loaded_target_are_hidden_states_one_later(tmp_path):
    """Failure 4: id i read as hidden_states[i], or the last one, which is normed. A public folder,
    read by both."""
    publish(tmp_path, small_target("untied"))
    theirs = Qwen3_5ForCausalLM.from_pretrained(
        str(tmp_path), dtype=torch.float32, key_mapping={"^model.language_model": "model"})
    x = tokens_of(2, 40)
    states = theirs.eval()(x, output_hidden_states=True).hidden_states
    ids = tuple(range(7))
    features, _ = load_target(str(tmp_path))(x, target_layer_ids=ids)
    for i in ids:
        assert apart(feature(features, i), states[i + 1]) < 1e-4, i
        assert apart(feature(features, i), states[i]) > 1e-2, i

# ------------------------------------------------------------------------------------------------
# fp32 inside a bf16 target


def half(shape, seed=0, scale=1.0):
    """Random numbers that bf16 holds exactly."""
    return (scale * random_normal(seed)(shape)).bfloat16()


def assert_rounded_once(x, exact):
    """x in bf16 is the exact number rounded: at most half a unit of its eight bits away."""
    assert x.dtype == torch.bfloat16
    assert ((x.double() - exact).abs() <= 1.01 * 2 ** -9 * 2 * exact.abs()).all()


def over_rms(x):
    """x / rms(x) in fp64."""
    x = x.double()
    return x / (x.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def test_norm_in_bf16_is_computed_in_fp32():
    """1 + w or the statistics rounded to bf16 before they are used: a gain of 1.003 becomes 1."""
    norm = RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data = half((64,), seed=1, scale=0.01)
    x = half((40, 64))
    assert_rounded_once(norm(x), over_rms(x) * (1 + norm.weight.double()))


def test_unit_length_in_bf16_is_computed_in_fp32():
    """Keys that are a percent too long: what is stored under them blows up."""
    x = half((40, 16), scale=3.0)
    unit = unit_length(x)
    assert unit.dtype == torch.float32
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert apart(unit, exact) < 1e-6


def test_gated_norm_in_bf16_has_an_fp32_gain_and_gate():
    """The gain of the gated norm, which stays in fp32, or its gate rounded to bf16."""
    norm = GatedRMSNorm(64, 1e-6)
    norm.weight.data = 1 + 0.3 * random_normal(1)((64,))
    x = half((400, 64))
    z = half((400, 64), seed=2)
    normed = over_rms(x).bfloat16().double()  # as transformers does, which trained it so
    exact = norm.weight.double() * normed * F.silu(z.double())
    close = (norm(x, z).double() - exact).abs() <= 1.01 * 2 ** -8 * exact.abs()
    # where normed lies between two numbers of bf16, fp32 and fp64 may round it to either
    assert close.float().mean() > 0.999


def test_product_of_one_row_is_summed_in_fp32():
    """On GPUs, in compiled code: sums of numbers that were rounded to bf16, an output of another
    shape or dtype, or sums where there are several rows. Here all code takes this form."""
    draw = random_normal()
    weight = draw(300, 500)
    with slip(linear_product,
              "is_one_row and x.is_cuda and torch.compiler.is_compiling()", "is_one_row"):
        for shape in ((500,), (1, 500), (1, 1, 500), (1, 2, 500), (2, 1, 500)):
            x = draw(shape)
            assert apart(linear_product(x, weight), F.linear(x, weight)) < 1e-6
            x_bf16 = x.bfloat16()
            weight_bf16 = weight.bfloat16()
            product = linear_product(x_bf16, weight_bf16)
            expected = F.linear(x_bf16.double(), weight_bf16.double())
            assert product.dtype == torch.bfloat16
            assert product.shape == expected.shape
            assert apart(product, expected) < 2e-3  # the output's own rounding


@torch.no_grad()
def test_decay_in_bf16_is_computed_in_fp32(monkeypatch):
    """The log of the fading from a time step in bf16: over thousands of tokens another state."""
    layer = copy.deepcopy(small_target("tied", torch.bfloat16)).layers[0].linear_attn
    layer.A_log.data = layer.A_log.float()
    given = {}

    def keep(q, k, v, g, beta):
        given["g"] = g
        return v, None

    monkeypatch.setattr(target_module, "gated_delta_rule", keep)
    x = half((1, 30, HIDDEN))
    layer(x, None, None)
    a = layer.in_proj_a(x)
    exact = -layer.A_log.double().exp() * F.softplus(a.double() + layer.dt_bias.double())
    assert given["g"].dtype == torch.float32
    assert apart(given["g"], exact) < 1e-6

# ------------------------------------------------------------------------------------------------
# sizes


def size(module):
    return sum(p.numel() for p in module.parameters())


def test_sizes_of_phase_1_2():
    """A layer, gain or bias too many or too few at the published widths."""
    with torch.device("meta"):
        config, drafter = phase_1_2()
        target = Target(config)
    assert size(target) == 752_393_024
    assert size(drafter) == 86_522_368


def test_random_targets_have_the_published_sizes():
    """A width of a published size that is mistyped."""
    sizes = {}
    for name in SIZES:
        config, folder = read_target_config(f"random:{name}")
        assert folder is None
        with torch.device("meta"):
            sizes[name] = size(Target(config))
    assert sizes == {
        "0.8b": 752_393_024, "2b": 1_881_825_088, "4b": 4_205_751_296, "9b": 8_953_803_264,
        "27b": 26_895_998_464}


def test_random_targets_are_always_the_same(monkeypatch):
    """Random weights that differ from run to run, are fp32 by mistake, or give the same logits
    everywhere; a wrong size or number of layers that passes."""
    monkeypatch.setitem(SIZES, "tiny", small_config("untied"))
    target = load_target("random:tiny")
    assert len(target.layers) == 8
    assert torch.equal(target.head_weight, load_target("random:tiny").head_weight)
    _, hidden = target(tokens_of(1, 9))
    assert target.logits(hidden).std() > 0

    half = load_target("random:tiny:4", dtype="bfloat16")
    assert half.config.layer_types == ("linear_attention",) * 3 + ("full_attention",)
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16 or name.endswith(FP32_NAMES), name

    for name in ("random:", "random:5b", "random:tiny:9", "random:tiny:0", "random:tiny:x"):
        with pytest.raises(ValueError, match="random:SIZE:LAYERS with a size of 0.8b, 2b"):
            load_target(name)
    with pytest.raises(ValueError, match="random weights and no tokenizer"):
        load_tokenizer("random:0.8b")

# ------------------------------------------------------------------------------------------------
# loading


LAYOUTS = (("model.language_model.", 3), ("model.language_model.", 1), ("model.", 1))


@pytest.mark.parametrize("prefix, shards", LAYOUTS)
@pytest.mark.parametrize("shape", ("tied", "untied"))
def test_load_target_is_bit_equal_in_every_layout(shape, prefix, shards, tmp_path):
    """Failure 10: a head, a shard or a prefix of which another loader would make something else; a
    weight of the decay or of the gated norm that is rounded to bf16."""
    target = small_target(shape)
    publish(tmp_path, target, prefix, shards)
    loaded = load_target(str(tmp_path))
    half = load_target(str(tmp_path), dtype="bfloat16").state_dict()
    assert loaded.config == target.config
    assert not any(p.requires_grad for p in loaded.parameters())
    for name, weight in target.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], weight), name
        if name.endswith(FP32_NAMES):
            assert half[name].dtype == torch.float32, name
            assert torch.equal(half[name], weight), name
        else:
            assert half[name].dtype == torch.bfloat16, name
            assert torch.equal(half[name], weight.bfloat16()), name


def test_load_target_takes_a_tied_head_that_is_repeated(tmp_path):
    """A public file that holds a tied head twice is refused, as if its head were left over."""
    target = small_target("tied")
    publish(tmp_path, target, shards=1)
    weights = public_weights(target) | {"lm_head.weight": target.embed_tokens.weight.clone()}
    save_file(weights, tmp_path / "model.safetensors")
    loaded = load_target(str(tmp_path))
    assert torch.equal(loaded.head_weight, target.embed_tokens.weight)


def test_load_target_refuses_what_it_cannot_read(tmp_path):
    """A missing shard, experts, or a config without a width end in something else than a line that
    names them."""
    text = publish(tmp_path, small_target("untied"))
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors"):
        load_target(str(tmp_path))
    with pytest.raises(ValueError, match="mixture-of-experts"):
        parse_target_config({"text_config": text | {"num_experts": 4}})
    del text["hidden_size"]
    with pytest.raises(ValueError, match="hidden_size"):
        parse_target_config(text)


def test_load_target_names_all_that_is_wrong_at_once(tmp_path):
    """Failure 10: one wrong tensor is named at a time, or none: a file of another size trains
    without a word."""
    target = small_target("untied")
    publish(tmp_path, target, shards=1)
    weights = public_weights(target)
    broken = dict(weights)
    broken["model.language_model.layers.9.extra"] = torch.ones(1)
    broken["lm_head.scale"] = torch.ones(1)
    broken["model.language_model.norm.weight"] = torch.ones(3)
    del broken["model.language_model.layers.0.linear_attn.A_log"]
    del broken["model.language_model.layers.3.self_attn.q_proj.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_target(str(tmp_path))
    message = str(error.value)
    assert "layers.9.extra is left over" in message
    assert "lm_head.scale is left over" in message
    assert "norm.weight is [3], not [64]" in message
    assert "layers.0.linear_attn.A_log is missing" in message
    assert "layers.3.self_attn.q_proj.weight is missing" in message

    for layer, value in enumerate((math.nan, math.inf, -math.inf)):
        weights[f"model.language_model.layers.{layer}.mlp.up_proj.weight"][3, layer] = value
    save_file(weights, tmp_path / "model.safetensors")
    hint = "layers.0.mlp.up_proj.weight is not finite.*layers.1.*layers.2"
    with pytest.raises(ValueError, match=hint):
        load_target(str(tmp_path))


MEASURE = """
import resource, sys
from fast import cpu
from checkpoint import load_target

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

cpu.MIN_PACKED = float(sys.argv[2])
before = peak()
target = load_target(sys.argv[1])
print(peak() - before)
print(sum(p.numel() * p.element_size() for p in target.parameters()))
"""
PACKING = ((math.inf, 1), (cpu.MIN_PACKED, 2))  # from how many numbers, and copies of a weight


@pytest.mark.parametrize("min_packed, copies", PACKING, ids=("plain", "packed"))
def test_load_target_peak_memory(tmp_path, capsys, min_packed, copies):
    """The file is held beside the model, and so once more the memory that a machine has for it.
    Large weights on a CPU, which are packed there, already need twice their size. One file is the
    harder case."""
    config = dataclasses.replace(
        small_config("untied"), vocab_size=20_000, hidden_size=512, intermediate_size=4096)
    publish(tmp_path, random_target(config, "cpu", torch.bfloat16), shards=1)
    # started by a shell, as a process inherits the peak of the one that starts it
    command = ["sh", "-c", '"$@"; exit $?', "sh",
               sys.executable, "-c", MEASURE, str(tmp_path), str(min_packed)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    peak, model = [int(line) for line in done.stdout.split()]
    with capsys.disabled():
        print(f" [host memory {peak / 1e6:.0f} MB for a model of {model / 1e6:.0f} MB] ", end="")
    # a fifth less, as the embedding of an untied head is not packed
    assert (copies - 0.2) * model < peak < (copies + 0.2) * model


def test_hub_ids_load_from_the_cache(monkeypatch, tmp_path):
    """An id that works online only; or one that is not in the cache, offline, and ends in a page of
    traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_copy(tmp_path, "some/target", NANO_TARGET)
    hub_copy(tmp_path, "some/drafter-dflash", NANO_DRAFTER)
    target = load_target("some/target")
    tokenizer = load_tokenizer("some/target")
    drafter = load_drafter("some/drafter-dflash", target.config)
    assert tokenizer_fingerprint("some/target") == tokenizer_fingerprint(NANO_TARGET)
    prompt = chat_prompt(tokenizer, questions()[0])
    from_the_hub = list(generate(target, drafter, prompt, 20))
    from_folders = list(generate(nano()[0], shipped(), prompt, 20))
    assert from_the_hub == from_folders

    hint = "no folder 'some/thing', and the hub does not give it.*its folder"
    with pytest.raises(ValueError, match=hint):
        load_target("some/thing")
    with pytest.raises(ValueError, match=hint):
        load_tokenizer("some/thing")
    with pytest.raises(ValueError, match=hint):
        load_drafter("some/thing", target.config)

# ------------------------------------------------------------------------------------------------
# config.json


REFUSED = (
    ({"num_experts": 4}, "mixture-of-experts"),
    ({"model_type": "qwen3_5_moe_text"}, "mixture"),
    ({"rope_parameters": {"rope_type": "yarn"}}, "rope_type = 'yarn'"),
    ({"quantization_config": {"bits": 4}}, "quantization_config"),
    ({"hidden_act": "gelu"}, "hidden_act"),
    ({"layer_types": ["full"] * 8}, "unknown kinds"),
    ({"layer_types": ["full_attention"]}, "1 entries for 8"),
    ({"linear_num_value_heads": 6}, "no multiple of linear_num_key_heads = 4"),
    ({"num_attention_heads": 3}, "no multiple of num_key_value_heads = 2"),
)


@pytest.mark.parametrize("change, hint", REFUSED)
def test_target_configs_that_are_refused(change, hint):
    """Failure 10: a target of another kind is computed as if it were ours."""
    text = vars(small_config("untied"))
    config = {"model_type": "qwen3_5", "text_config": text | change}
    with pytest.raises(ValueError, match=hint):
        parse_target_config(config)


NEEDED = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
          "num_attention_heads", "num_key_value_heads", "head_dim", "linear_num_key_heads",
          "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
ABSENT = {  # what a key means that a public file may leave out, spelled out
    "linear_conv_kernel_dim": 4, "rms_norm_eps": 1e-6, "rope_theta": 1e7,
    "partial_rotary_factor": 0.25, "tie_word_embeddings": False,
    "max_position_embeddings": 262144, "eos_token_id": None, "pad_token_id": None,
    "layer_types": (("linear_attention",) * 3 + ("full_attention",)) * 2}
PRESENT = {
    "linear_conv_kernel_dim": 3, "rms_norm_eps": 1e-5, "rope_theta": 5e5,
    "partial_rotary_factor": 0.5, "tie_word_embeddings": True, "max_position_embeddings": 777,
    "eos_token_id": 7, "pad_token_id": 8, "layer_types": ("full_attention",) * 8}


@pytest.mark.parametrize("key", ABSENT)
def test_target_configs_have_the_published_defaults(key):
    """Failure 10: a key that a public file leaves out gets another value than its publishers mean;
    or one that it has is not read, inside text_config or at the top."""
    needed = {name: vars(small_config("untied"))[name] for name in NEEDED}
    parsed = parse_target_config({"text_config": needed})
    assert getattr(parsed, key) == ABSENT[key]
    assert set(vars(parsed)) == {*NEEDED, *ABSENT}
    value = {key: PRESENT[key]}
    for config in ({"text_config": needed | value}, {"text_config": needed} | value,
                   needed | value):
        assert getattr(parse_target_config(config), key) == PRESENT[key]


@pytest.mark.parametrize("key", NEEDED)
def test_target_configs_without_a_width_are_refused(key):
    """Failure 10: a width that is guessed where a file does not say it."""
    needed = {name: vars(small_config("untied"))[name] for name in NEEDED}
    del needed[key]
    with pytest.raises(ValueError, match=key):
        parse_target_config({"text_config": needed})


def test_target_configs_flat_and_without_defaults(tmp_path):
    """Failure 10: a flat config.json is not read, rope keys are looked for in one place only, or a
    key that publishers leave out gets another value than the published one."""
    config = small_config("untied")
    text = publish(tmp_path, small_target("untied"))
    assert parse_target_config(text | {"num_experts": 0}) == config

    for name in ("rope_parameters", "rope_scaling"):
        moved = dict(text)
        del moved["rope_parameters"]
        moved[name] = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
        parsed = parse_target_config(moved)
        assert parsed.rope_theta == 5e5, name
        assert parsed.partial_rotary_factor == 0.5, name

    for name in ("rope_parameters", "rms_norm_eps", "pad_token_id", "layer_types"):
        del text[name]
    parsed = parse_target_config(text)
    assert parsed.rope_theta == 1e7
    assert parsed.partial_rotary_factor == 0.25
    assert parsed.rms_norm_eps == 1e-6
    assert parsed.pad_token_id is None
    assert parsed.layer_types == config.layer_types


def test_only_bf16_models_multiply_in_tf32():
    """fp32 that is none: a target in float32, loaded after one in bfloat16, with products of 11
    bits; or a delta rule on a GPU at half its speed."""
    for dtype, is_tf32 in (("bfloat16", True), ("float32", False)):
        load_target(NANO_TARGET, dtype=dtype)
        assert torch.backends.cuda.matmul.allow_tf32 == is_tf32
