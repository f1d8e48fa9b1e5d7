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
from transformers.models.qwen3_5 import modeling_qwen3_5

import target as target_module
from tokenizer import load_tokenizer, tokenizer_fingerprint
from checkpoint import (SIZES, load_drafter, load_target, parse_target_config, random_target,
                        read_target_config)
from target import GatedRMSNorm, RMSNorm, Target, unit_length
from tests.common import (HIDDEN, LAYER_IDS, NANO_DRAFTER, NANO_TARGET, ROOT, apart,
                          hub_copy, nano, perturb, public_weights, publish, random_normal,
                          shipped, small_config, small_target, tokens_of)

FP32_NAMES = ("linear_attn.A_log", "linear_attn.norm.weight")  # fp32 in models of all dtypes

# ------------------------------------------------------------------------------------------------
# the same numbers as transformers


@functools.cache
def peer(shape):
    """A random Qwen3_5ForCausalLM of transformers, and our Target with its weights."""
    c = small_config(shape)
    keys = dict(vars(c))
    theta = keys.pop("rope_theta")
    keys["layer_types"] = list(c.layer_types)
    keys["rope_parameters"] = {
        "rope_type": "default", "rope_theta": theta,
        "partial_rotary_factor": c.partial_rotary_factor, "mrope_section": [2, 1, 1]}
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


@pytest.mark.parametrize("T", (1, 16, 17, 65, 130))
@pytest.mark.parametrize("shape", ("tied", "untied"))
@torch.no_grad()
def test_target_equals_transformers(shape, T):
    """Failure 4: a feature is not the residual stream after its layer, or the math differs."""
    theirs, ours = peer(shape)
    x = tokens_of(2, T, seed=T)
    reference = theirs(x, output_hidden_states=True)
    features, hidden = ours(x, target_layer_ids=LAYER_IDS)
    assert apart(ours.logits(hidden), reference.logits) < 1e-4
    for index, i in enumerate(LAYER_IDS):
        assert apart(feature(features, index), reference.hidden_states[i + 1]) < 1e-4, i
    # features alone
    alone, nothing = ours(x, target_layer_ids=LAYER_IDS, features_only=True)
    assert torch.equal(alone, features)
    assert nothing is None


def test_features_only_run_no_layer_above_the_last():
    """Training runs layers whose outputs nobody needs."""
    target = copy.deepcopy(small_target())
    ran = []
    for i, layer in enumerate(target.layers):
        layer.register_forward_hook(lambda *_, i=i: ran.append(i))
    target(tokens_of(1, 2), target_layer_ids=(0, 3), features_only=True)
    assert ran == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="target_layer_ids"):
        target(tokens_of(1, 2), features_only=True)

# ------------------------------------------------------------------------------------------------
# fp32 inside a bf16 target


def half(*shape, seed=0):
    """Random numbers that bf16 holds exactly."""
    return random_normal(seed)(shape).bfloat16()


@torch.no_grad()
def test_norms_in_bf16_are_those_of_transformers():
    """Statistics, a gain, or a gate is rounded to bf16 before it is used. Or keys are a percent too
    long, and the state blows up."""
    x = half(400, 64)
    gate = half(400, 64, seed=2)
    norm = RMSNorm(64, 1e-6).bfloat16()
    theirs = modeling_qwen3_5.Qwen3_5RMSNorm(64, 1e-6).bfloat16()
    norm.weight.data = theirs.weight.data = half(64, seed=1) / 128
    # the order of a sum can flip a rounding
    assert (norm(x) == theirs(x)).float().mean() > 0.999

    gated = GatedRMSNorm(64, 1e-6)
    theirs = modeling_qwen3_5.Qwen3_5RMSNormGated(64, 1e-6)
    gated.weight.data = theirs.weight.data = 1 + 0.3 * random_normal(1)((64,))
    assert (gated(x, gate) == theirs(x, gate)).float().mean() > 0.999

    unit = unit_length(x)
    assert unit.dtype == torch.float32
    exact = x.double() / (x.double().square().sum(-1, keepdim=True) + 1e-6).sqrt()
    assert apart(unit, exact) < 1e-6


@torch.no_grad()
def test_decay_in_bf16_is_computed_in_fp32(monkeypatch):
    """The log of the decay is computed in bf16: the state drifts over thousands of tokens."""
    layer = copy.deepcopy(small_target("tied", torch.bfloat16)).layers[0].linear_attn
    layer.A_log.data = layer.A_log.float()
    given = {}

    def keep(q, k, v, g, beta):
        given["g"] = g
        return v, None

    monkeypatch.setattr(target_module, "gated_delta_rule", keep)
    x = half(1, 30, HIDDEN)
    layer(x, None, None)
    a = layer.in_proj_a(x)
    exact = -layer.A_log.double().exp() * F.softplus(a.double() + layer.dt_bias.double())
    assert given["g"].dtype == torch.float32
    assert apart(given["g"], exact) < 1e-6

# ------------------------------------------------------------------------------------------------
# sizes


def test_random_targets_have_the_published_sizes():
    """A width of a published size is mistyped."""
    sizes = {}
    for name in SIZES:
        config, folder = read_target_config(f"random:{name}")
        assert folder is None
        with torch.device("meta"):
            sizes[name] = sum(p.numel() for p in Target(config).parameters())
    assert sizes == {
        "0.8b": 752_393_024, "2b": 1_881_825_088, "4b": 4_205_751_296, "9b": 8_953_803_264,
        "27b": 26_895_998_464}


def test_random_targets_are_always_the_same(monkeypatch):
    """Random weights differ from run to run, are fp32 by mistake, or give constant logits; a wrong
    size or number of layers passes."""
    monkeypatch.setitem(SIZES, "tiny", small_config("untied"))
    target = load_target("random:tiny")
    assert torch.equal(target.head_weight, load_target("random:tiny").head_weight)
    _, hidden = target(tokens_of(1, 9))
    assert target.logits(hidden).std() > 0

    half = load_target("random:tiny:5", dtype="bfloat16")
    linear = "linear_attention"
    assert half.config.layer_types == (linear, linear, linear, "full_attention", linear)
    for name, weight in half.state_dict().items():
        assert weight.dtype == torch.bfloat16 or name.endswith(FP32_NAMES), name

    for name in ("random:", "random:5b", "random:tiny:9", "random:tiny:0", "random:tiny:x"):
        with pytest.raises(ValueError, match="random:SIZE:LAYERS, a size of 0.8b, 2b"):
            load_target(name)
    with pytest.raises(ValueError, match="random weights and no tokenizer"):
        load_tokenizer("random:0.8b")

# ------------------------------------------------------------------------------------------------
# loading


LAYOUTS = (("model.language_model.", 3), ("model.language_model.", 1), ("model.", 1))


@pytest.mark.parametrize("prefix, shards", LAYOUTS)
@pytest.mark.parametrize("shape", ("tied", "untied"))
def test_load_target_is_bit_equal_in_every_layout(shape, prefix, shards, tmp_path):
    """Failure 10: a head, shard, or prefix is misread, or an fp32 weight is rounded to bf16."""
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


def test_load_target_takes_a_repeated_head_and_misses_a_shard(tmp_path):
    """A public file that contains a tied head twice is refused; a missing shard ends in a
    traceback."""
    target = small_target("tied")
    publish(tmp_path / "tied", target, shards=1)
    weights = public_weights(target) | {"lm_head.weight": target.embed_tokens.weight.clone()}
    save_file(weights, tmp_path / "tied" / "model.safetensors")
    loaded = load_target(str(tmp_path / "tied"))
    assert torch.equal(loaded.head_weight, target.embed_tokens.weight)

    publish(tmp_path / "sharded", target)
    (tmp_path / "sharded" / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(ValueError, match="model-00002-of-00002.safetensors"):
        load_target(str(tmp_path / "sharded"))


def test_load_target_names_all_that_is_wrong_at_once(tmp_path):
    """Failure 10: a file of a different size trains silently, or its errors come one at a time. The
    message shows three, and says how many there are."""
    publish(tmp_path, small_target("untied"), shards=1)
    weights = public_weights(small_target("untied"))
    prefix = "model.language_model."
    broken = weights | {
        f"{prefix}layers.9.extra": torch.ones(1), "lm_head.scale": torch.ones(1),
        f"{prefix}norm.weight": torch.ones(3)}
    del broken[f"{prefix}layers.0.linear_attn.A_log"]
    del broken[f"{prefix}layers.3.self_attn.q_proj.weight"]
    save_file(broken, tmp_path / "model.safetensors")
    with pytest.raises(ValueError) as error:
        load_target(str(tmp_path))
    for part in ("5 tensors of", "layers.9.extra is left over", "lm_head.scale is left over",
                 "norm.weight is [3], not [64]"):
        assert part in str(error.value)

    for layer, value in enumerate((math.nan, math.inf, -math.inf)):
        weights[f"{prefix}layers.{layer}.mlp.up_proj.weight"][3, layer] = value
    save_file(weights, tmp_path / "model.safetensors")
    hint = "layers.0.mlp.up_proj.weight is not finite.*layers.1.*layers.2"
    with pytest.raises(ValueError, match=hint):
        load_target(str(tmp_path))


MEASURE = """
import resource, sys
import fast
from checkpoint import load_target

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

before = peak()
target = load_target(sys.argv[1])
print(peak() - before)
fast.prepare_for_decoding(target)
print(peak() - before)
print(sum(p.numel() * p.element_size() for p in target.parameters()))
"""


def test_load_target_peak_memory(tmp_path):
    """The file stays in memory next to the model. Large weights on a CPU are packed, which needs
    twice their size. One file is the harder case."""
    config = dataclasses.replace(
        small_config("untied"), vocab_size=20_000, hidden_size=512, intermediate_size=4096)
    publish(tmp_path, random_target(config, "cpu", torch.bfloat16), shards=1)
    # started by a shell, because a process inherits the peak of its parent
    command = ["sh", "-c", '"$@"; exit $?', "sh", sys.executable, "-c", MEASURE, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    loaded, packed, model = [int(line) for line in done.stdout.split()]
    assert 0.8 * model < loaded < 1.2 * model
    # a fifth less, because the embedding of an untied head is not packed
    assert 1.8 * model < packed < 2.2 * model


def test_hub_ids_load_from_the_cache(monkeypatch, tmp_path):
    """An id works only online, or an id that is not in the cache ends in a traceback."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    hub_copy(tmp_path, "some/target", NANO_TARGET)
    hub_copy(tmp_path, "some/drafter-dflash", NANO_DRAFTER)
    target = load_target("some/target")
    drafter = load_drafter("some/drafter-dflash", target.config)
    for model, expected in ((target, nano()[0]), (drafter, shipped())):
        weights = expected.state_dict()
        for name, weight in model.state_dict().items():
            assert torch.equal(weight, weights[name]), name
    assert tokenizer_fingerprint("some/target") == tokenizer_fingerprint(NANO_TARGET)
    assert len(load_tokenizer("some/target")) == len(nano()[1])

    hint = "no folder 'some/thing', and the hub does not give it.*its folder"
    for load, more in ((load_target, ()), (load_tokenizer, ()), (load_drafter, (target.config,))):
        with pytest.raises(ValueError, match=hint):
            load("some/thing", *more)

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
    """Failure 10: a target of a different kind is computed as if it were ours."""
    text = vars(small_config("untied"))
    config = {"model_type": "qwen3_5", "text_config": text | change}
    with pytest.raises(ValueError, match=hint):
        parse_target_config(config)


OPTIONAL = {  # what a key means that a public file may leave out, and a different value
    "linear_conv_kernel_dim": (4, 3), "rms_norm_eps": (1e-6, 1e-5), "rope_theta": (1e7, 5e5),
    "partial_rotary_factor": (0.25, 0.5), "tie_word_embeddings": (False, True),
    "max_position_embeddings": (262144, 777), "eos_token_id": (None, 7), "pad_token_id": (None, 8),
    "layer_types": ((("linear_attention",) * 3 + ("full_attention",)) * 2, ("full_attention",) * 8)}
NEEDED = vars(small_config("untied")).keys() - OPTIONAL


def needed_keys():
    return {name: vars(small_config("untied"))[name] for name in NEEDED}


def test_target_configs_have_the_published_defaults():
    """Failure 10: an absent key gets a different value than its publishers mean, a key inside
    text_config or at the top is not read, or a width that the file does not contain is guessed."""
    needed = needed_keys()
    parsed = parse_target_config({"text_config": needed})
    for key, (default, value) in OPTIONAL.items():
        assert getattr(parsed, key) == default
        for config in ({"text_config": needed | {key: value}},
                       {"text_config": needed, key: value}, needed | {key: value}):
            assert getattr(parse_target_config(config), key) == value, key
    five_layers = parse_target_config(needed | {"num_hidden_layers": 5})
    assert five_layers.layer_types == parsed.layer_types[:5]
    for key in needed:
        with pytest.raises(ValueError, match=key):
            parse_target_config({"text_config": {k: needed[k] for k in needed if k != key}})


@pytest.mark.parametrize("place", ("rope_parameters", "rope_scaling"))
def test_target_configs_have_rope_keys_in_either_place(place):
    """Failure 10: theta or the rotary fraction is read in one place only, or a dense target that
    says so is refused."""
    rope = {"rope_theta": 5e5, "partial_rotary_factor": 0.5}
    parsed = parse_target_config(needed_keys() | {place: rope, "num_experts": 0})
    assert (parsed.rope_theta, parsed.partial_rotary_factor) == (5e5, 0.5)
