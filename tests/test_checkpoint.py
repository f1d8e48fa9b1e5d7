"""
Checkpoints of drafters: what engines read in them, what published ones have otherwise, and what is
refused.
"""
import dataclasses
import json
import math
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

from checkpoint import (drafter_config, load_drafter, newest_checkpoint, public_drafter_config,
                        save_drafter)
from fast.cpu import attention_by_anchor_groups
from model import DFlashDraftModel
from target import TargetConfig
from tests.common import (DRAFTERS, FULL, HIDDEN, K, LAYER_IDS, MASK, NANO_DRAFTER, ROOT, SLIDING,
                          V, apart, edit_json, perturb, random_normal, small_config,
                          small_drafter)


def save(drafter, folder):
    """Write a checkpoint and return its config.json, parsed."""
    save_drafter(drafter, str(folder), "# card\n", {"training_state.pt": {"step": 1}})
    return json.loads((folder / "config.json").read_text())


def load(folder):
    return load_drafter(str(folder), small_config())


def load_by_auto_model(folder):
    model = AutoModel.from_pretrained(
        str(folder), trust_remote_code=True, dtype=torch.float32)
    return model.eval()

# ------------------------------------------------------------------------------------------------
# what engines read


def test_checkpoint_is_what_engines_read(tmp_path):
    """Failure 10: rope_theta at one place only, the target's partial rotary inherited, a key that
    some engine reads missing."""
    config = save(small_drafter(), tmp_path / "a-dflash")
    expected = {
        "architectures": ["DFlashDraftModel"], "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        "block_size": 16,
        "dflash_config": {
            "block_size": 16, "mask_token_id": MASK, "target_layer_ids": list(LAYER_IDS)},
        "num_target_layers": 8, "num_hidden_layers": 2, "layer_types": [FULL, FULL],
        "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "hidden_act": "silu", "rms_norm_eps": 1e-6,
        "attention_bias": False, "max_position_embeddings": 512, "vocab_size": V,
        "tie_word_embeddings": False, "rope_theta": 1e7, "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
        "use_sliding_window": False, "sliding_window": None, "max_window_layers": 2,
        "dtype": "bfloat16", "torch_dtype": "bfloat16"}
    assert expected.items() <= config.items()
    text = json.dumps(config)
    assert "partial_rotary" not in text
    assert "mrope" not in text


LAYER_WEIGHTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm")


def weight_names(layers):
    """The names of a drafter's weights in the order of published checkpoints."""
    names = []
    for i in range(layers):
        names += [f"layers.{i}.{part}.weight" for part in LAYER_WEIGHTS]
    return names + ["norm.weight", "fc.weight", "hidden_norm.weight"]


def test_checkpoint_holds_the_published_files_and_tensors(tmp_path):
    """Failure 10: tensors renamed or not bf16; a file that is missing or left over; a dflash.py
    that is not model.py."""
    folder = tmp_path / "a-dflash"
    save(small_drafter(), folder)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert set(f.keys()) == set(weight_names(2))
        assert f.metadata() == {"format": "pt"}
        for name in f.keys():
            assert f.get_tensor(name).dtype == torch.bfloat16, name
        assert f.get_tensor("fc.weight").shape == (HIDDEN, 3 * HIDDEN)
    files = {"config.json", "model.safetensors", "dflash.py", "README.md", "training_state.pt"}
    assert set(os.listdir(folder)) == files
    assert os.listdir(tmp_path) == ["a-dflash"]
    with open(os.path.join(ROOT, "model.py")) as f:
        assert (folder / "dflash.py").read_text() == f.read()


def test_shipped_drafter_carries_model_py():
    """The file you read is the file you ship: after an edit,
    cp model.py data/nano/drafter-dflash/dflash.py"""
    with open(os.path.join(ROOT, "model.py")) as f:
        source = f.read()
    with open(os.path.join(NANO_DRAFTER, "dflash.py")) as f:
        assert f.read() == source


def test_checkpoint_order_is_that_of_optimizer_states():
    """Failure 12: moments saved by SpecForge go by index; in another order each lands on another
    parameter."""
    drafter = small_drafter((FULL,) * 5)
    names = [name for name, _ in drafter.named_parameters()]
    assert names == weight_names(5)


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
@torch.no_grad()
def test_checkpoint_loads_by_auto_model(layer_types, window, tmp_path):
    """Failure 10: the shipped dflash.py needs the project around it, or a window, theta or mask is
    lost on the way."""
    drafter = small_drafter(layer_types, window)
    save(drafter, tmp_path / "b-dflash")
    ours = load(tmp_path / "b-dflash")
    theirs = load_by_auto_model(tmp_path / "b-dflash")
    assert type(theirs).__name__ == "DFlashDraftModel"
    assert type(theirs) is not DFlashDraftModel
    for loaded in (ours, theirs):
        assert loaded.target_layer_ids == LAYER_IDS
        assert loaded.block_size == K
        assert loaded.mask_token_id == MASK

    draw = random_normal()
    features = draw(2, 40, len(LAYER_IDS) * HIDDEN)
    blocks = draw(2, 3, K, HIDDEN)
    anchors = torch.tensor([[1, 20, 33], [0, 8, 39]])
    hidden = ours(features, blocks, anchors, attention_by_anchor_groups)
    assert torch.equal(theirs(features, blocks, anchors, attention_by_anchor_groups), hidden)
    # and they are the drafter's own, but for its weights in bf16
    rounded = drafter.bfloat16().float()
    assert torch.equal(rounded(features, blocks, anchors, attention_by_anchor_groups), hidden)


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
def test_checkpoint_round_trip_is_bit_equal(layer_types, window, tmp_path):
    """Failure 10: a checkpoint that changes by being loaded and written again."""
    save(small_drafter(layer_types, window), tmp_path / "one-dflash")
    save(load(tmp_path / "one-dflash"), tmp_path / "two-dflash")
    for name in os.listdir(tmp_path / "one-dflash"):
        one = (tmp_path / "one-dflash" / name).read_bytes()
        assert (tmp_path / "two-dflash" / name).read_bytes() == one, name


@pytest.mark.parametrize("is_reversed", (False, True))
def test_checkpoint_of_a_step_is_the_newest_whole_one(is_reversed, monkeypatch, tmp_path):
    """A half-written folder is taken for the newest, or whichever the file system lists last."""
    for name in ("step-000010", "step-000009", "step-000011.part", "notes"):
        (tmp_path / name).mkdir()
    names = sorted(os.listdir(tmp_path), reverse=is_reversed)
    monkeypatch.setattr(os, "listdir", lambda folder: names)
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "step-000010")
    (tmp_path / "config.json").write_text("{}")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path)
    assert newest_checkpoint("nowhere") == "nowhere"


def test_save_into_a_folder_that_cannot_be_written(tmp_path):
    """A run of hours that ends in a traceback at its first checkpoint; a half-written folder taken
    for a whole one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the checkpoint .*Not a directory"):
        save_drafter(small_drafter(), str(tmp_path / "file" / "a-dflash"), "")
    assert os.listdir(tmp_path) == ["file"]

# ------------------------------------------------------------------------------------------------
# the contract's seven rules, each of them a test


@pytest.fixture
def contract(tmp_path):
    """config.json and the weights of a checkpoint of five layers."""
    config = save(small_drafter((FULL,) * 5), tmp_path / "d-dflash")
    return config, load_file(tmp_path / "d-dflash" / "model.safetensors")


def test_failure_10_contract_1_block_size_in_both_places(contract):
    """Failure 10: an engine that looks in the other place for it falls back to its own default; or
    layer ids and mask are not where all look for them."""
    config, _ = contract
    assert config["block_size"] == K
    assert config["dflash_config"]["block_size"] == K
    assert set(config["dflash_config"]) == {"block_size", "mask_token_id", "target_layer_ids"}


def test_failure_10_contract_2_rope_theta_in_both_places(contract):
    """Failure 10: readers of the key that is missing rotate by 10000."""
    config, _ = contract
    assert config["rope_theta"] == 1e7
    assert config["rope_parameters"] == {"rope_type": "default", "rope_theta": 1e7}
    assert config["rope_scaling"] is None


def test_failure_10_contract_3_nothing_of_the_targets_rotary(contract):
    """Failure 10: an engine rotates a quarter of each head, as the target does."""
    config, _ = contract
    text = json.dumps(config)
    assert "partial" not in text
    assert "mrope" not in text


def test_failure_10_contract_4_layer_ids_ascend(contract):
    """Failure 10: features in another order than fc's columns, or of the last layer, which is
    normed."""
    config, _ = contract
    ids = config["dflash_config"]["target_layer_ids"]
    assert ids == sorted(set(ids))
    assert config["num_target_layers"] == 8
    assert max(ids) <= config["num_target_layers"] - 2


def test_failure_10_contract_5_exactly_these_tensors(contract):
    """Failure 10: a tensor more, less or under another name."""
    config, weights = contract
    assert len(weights) == 3 + 11 * config["num_hidden_layers"] == 58
    assert weights["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    assert not any(name.startswith("model.") for name in weights)


def test_failure_10_contract_6_plain_norms(contract):
    """Failure 10: gains near zero, as of the target's norms, where w and not 1 + w is meant."""
    _, weights = contract
    for name, weight in weights.items():
        if "norm" in name:
            assert abs(weight.float().mean() - 1) < 0.5, name


def test_failure_10_contract_7_bf16(contract):
    """Failure 10: a dtype in the file that is not the one that config.json names."""
    config, weights = contract
    assert config["dtype"] == config["torch_dtype"] == "bfloat16"
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}

# ------------------------------------------------------------------------------------------------
# published drafters, whose config.json is other than ours


def like_the_4b(config):
    """rope_theta and block_size inside only; other optional keys missing or set."""
    for name in ("rope_theta", "block_size", "torch_dtype", "max_window_layers"):
        del config[name]
    config["tie_word_embeddings"] = True
    config["pad_token_id"] = None


def like_the_27b(config):
    """rope_theta and block_size outside only."""
    del config["rope_parameters"]
    del config["dflash_config"]["block_size"]


def with_the_window_flag_off(config):
    config["use_sliding_window"] = False


def without_the_window_flag(config):
    del config["use_sliding_window"]


def without_the_target_layers(config):
    del config["num_target_layers"]
    del config["layer_types"]


def with_rope_scaling(config):
    """The older name of rope_parameters."""
    config["rope_scaling"] = config.pop("rope_parameters")
    del config["rope_theta"]


PUBLISHED = (  # heads, key-value heads, head width; layer types; what is other in config.json
    ((4, 2, 32), (SLIDING,) * 5 + (FULL,), like_the_4b),
    ((8, 4, 16), (FULL,) * 5, like_the_27b),
    ((2, 1, 64), (SLIDING, FULL), with_the_window_flag_off),
    ((2, 1, 64), (SLIDING, FULL), without_the_window_flag),
    ((4, 2, 16), (FULL,), without_the_target_layers),
    ((4, 2, 16), (FULL,), with_rope_scaling),
)
PUBLISHED_IDS = (0, 2, 3, 6)


def published_drafter(shape, layer_types):
    """A drafter of blocks of 8 with four features, whose weights bf16 holds exactly."""
    heads, kv_heads, head_dim = shape
    config = drafter_config(
        small_config(), len(layer_types), PUBLISHED_IDS, mask_token_id=270, heads=heads,
        kv_heads=kv_heads, head_dim=head_dim, mlp=48, block_size=8)
    config.layer_types = list(layer_types)
    config.use_sliding_window = SLIDING in layer_types
    config.sliding_window = 12 if config.use_sliding_window else None
    return perturb(DFlashDraftModel(config), scale=5.0).bfloat16().float()


@pytest.mark.parametrize("shape, layer_types, edit", PUBLISHED)
@torch.no_grad()
def test_published_drafters_load_by_their_config(shape, layer_types, edit, tmp_path):
    """Failure 10: layers as many as features, one head layout, one mask, or one place of a key are
    taken for granted."""
    drafter = published_drafter(shape, layer_types)
    folder = tmp_path / "e-dflash"
    public = save(drafter, folder)
    edited = json.loads(json.dumps(public))
    edit(edited)
    (folder / "config.json").write_text(json.dumps(edited))
    (folder / "dflash.py").unlink()  # not every imported checkpoint has one
    loaded = load(folder)
    assert loaded.target_layer_ids == PUBLISHED_IDS
    assert loaded.block_size == 8
    assert loaded.mask_token_id == 270
    assert len(loaded.layers) == len(layer_types)

    # in training's form, in decoding, and by AutoModel from what is written again
    draw = random_normal()
    features = draw(1, 30, len(PUBLISHED_IDS) * HIDDEN)
    blocks = draw(1, 2, 8, HIDDEN)
    anchors = torch.tensor([[9, 25]])
    hidden = loaded(features, blocks, anchors, attention_by_anchor_groups)
    expected = drafter(features, blocks, anchors, attention_by_anchor_groups)
    assert apart(hidden, expected) < 1e-5
    cache = loaded.new_cache(1, 40)
    loaded.write_context(features[:, :25], cache, torch.tensor([0]))
    decoded = loaded.decode_block(blocks[:, 1], cache, torch.tensor([25]))
    assert apart(decoded, expected[:, 1]) < 1e-5

    again = save(loaded, tmp_path / "f-dflash")
    public["pad_token_id"] = loaded.config.pad_token_id
    assert again == public
    theirs = load_by_auto_model(tmp_path / "f-dflash")
    assert torch.equal(theirs(features, blocks, anchors, attention_by_anchor_groups), hidden)


def test_drafter_config_without_a_pad_token():
    """Failure 10: a target without pad_token_id gives a drafter without one; its publishers pad
    with the end of text."""
    ids = {"eos_token_id": 7, "pad_token_id": None}
    target = TargetConfig(**vars(small_config()) | ids)
    shape = {"layers": 1, "heads": 4, "kv_heads": 2, "head_dim": 16, "mlp": 96}
    config = drafter_config(target, target_layer_ids=LAYER_IDS, mask_token_id=MASK, **shape)
    public = public_drafter_config(config)
    assert public["pad_token_id"] == public["eos_token_id"] == 7
    target.pad_token_id = 8
    config = drafter_config(target, target_layer_ids=LAYER_IDS, mask_token_id=MASK, **shape)
    assert public_drafter_config(config)["pad_token_id"] == 8


def test_drafter_follows_its_target_in_all_that_they_share(tmp_path):
    """Failure 10: a value of the target that the drafter has of another one: an eps, a theta or a
    length of context that is usual; or that is lost on the way to config.json and back."""
    target = dataclasses.replace(
        small_config(), rms_norm_eps=1e-3, rope_theta=5e5, max_position_embeddings=777,
        eos_token_id=7, pad_token_id=8)
    config = drafter_config(
        target, layers=1, target_layer_ids=LAYER_IDS, mask_token_id=MASK, heads=4, kv_heads=2,
        head_dim=16, mlp=96, block_size=8)
    config.attention_bias = True
    config.initializer_range = 0.5
    drafter = perturb(DFlashDraftModel(config), scale=5.0)
    public = save(drafter, tmp_path / "a-dflash")
    expected = {
        "rms_norm_eps": 1e-3, "rope_theta": 5e5, "max_position_embeddings": 777,
        "eos_token_id": 7, "pad_token_id": 8, "hidden_size": HIDDEN, "vocab_size": V,
        "num_target_layers": 8, "attention_bias": True, "initializer_range": 0.5,
        "block_size": 8}
    assert expected.items() <= public.items()
    loaded = load_drafter(str(tmp_path / "a-dflash"), target)
    assert loaded.norm.eps == loaded.layers[0].self_attn.q_norm.eps == 1e-3
    assert loaded.layers[0].self_attn.q_proj.bias is not None
    assert save(loaded, tmp_path / "b-dflash") == public


@pytest.mark.parametrize("key, default", (
    ("rms_norm_eps", 1e-6), ("attention_bias", False), ("layer_types", [FULL, FULL]),
    ("num_target_layers", 8), ("hidden_act", "silu"), ("rope_scaling", None)))
def test_published_drafters_without_a_key(tmp_path, key, default):
    """Failure 10: a key that a published drafter leaves out gets another value than the usual."""
    folder = tmp_path / "a-dflash"
    public = save(small_drafter(), folder)
    edit_json(folder / "config.json", remove=[key])
    assert save(load(folder), tmp_path / "b-dflash") == public
    assert public[key] == default

# ------------------------------------------------------------------------------------------------
# what is refused


@pytest.fixture
def refused(tmp_path):
    """refused(hint, remove, **change): loading a checkpoint whose config.json lacks and has other
    keys ends in a line that says why."""
    folder = tmp_path / "c-dflash"
    config = save(small_drafter(), folder)

    def call(hint, remove=(), **change):
        (folder / "config.json").write_text(json.dumps(config))
        edit_json(folder / "config.json", remove, **change)
        with pytest.raises(ValueError, match=hint):
            load(folder)
    return call


def dflash(remove=(), **change):
    """The dflash_config of the small drafter, edited."""
    config = {"block_size": K, "mask_token_id": MASK, "target_layer_ids": list(LAYER_IDS)}
    config |= change
    for name in remove:
        del config[name]
    return config


def test_drafter_of_another_target_is_refused(refused):
    """Failure 10: acceptance collapses without a word, as the drafter reads another target's
    features or head."""
    refused("hidden_size is 128, the target's 64", hidden_size=128)
    refused("vocab_size is 512, the target's 300", vocab_size=512)
    refused("num_target_layers is 24, the target's 8", num_target_layers=24)
    refused("mask id 300 of 300", dflash_config=dflash(mask_token_id=300))
    refused("layer 7 of 8", dflash_config=dflash(target_layer_ids=[0, 3, 7]))
    refused("layers.2", num_hidden_layers=3, layer_types=[FULL] * 3)
    refused("layers.1", num_hidden_layers=1, layer_types=[FULL])
    refused("has no dflash_config", remove=["dflash_config"])


def test_drafters_that_compute_otherwise_are_refused(refused):
    """Failures 3 and 10: a config.json that asks for what is not computed loads all the same, and
    guesses badly."""
    rope = {"rope_type": "default", "rope_theta": 1e7}
    refused("block_size is 8 at the top and 16 inside", block_size=8)
    refused("has no block_size", ["block_size"], dflash_config=dflash(["block_size"]))
    refused("rope_theta is 10000 at the top and 1", rope_theta=10000)
    refused("has no rope_theta", ["rope_theta", "rope_parameters"])
    refused("partial_rotary_factor", partial_rotary_factor=0.25)
    refused("partial_rotary_factor", rope_parameters=rope | {"partial_rotary_factor": 0.25})
    refused("yarn", rope_parameters=rope | {"rope_type": "yarn"})
    refused("gelu", hidden_act="gelu")
    refused("conv_kernel_size", dflash_config=dflash(conv_kernel_size=2))
    refused("has no hidden_size", ["hidden_size"])
    refused("mask_token_id", dflash_config=dflash(["mask_token_id"]))
    refused("no sliding_window", layer_types=[SLIDING, FULL])
    refused("must ascend", dflash_config=dflash(target_layer_ids=[3, 0, 6]))
    refused("not be negative", dflash_config=dflash(mask_token_id=-1))


def test_drafters_with_wrong_weights_are_refused(tmp_path):
    """Failure 10: a tensor that is missing, left over or not finite is not noticed."""
    folder = tmp_path / "g-dflash"
    save(small_drafter(), folder)
    weights = load_file(folder / "model.safetensors")
    weights["fc.weight"][0, 0] = math.nan
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="fc.weight is not finite"):
        load(folder)
    del weights["norm.weight"]
    weights["lm_head.weight"] = torch.ones(1)
    save_file(weights, folder / "model.safetensors")
    with pytest.raises(ValueError, match="lm_head.weight is left over, norm.weight is missing"):
        load(folder)
