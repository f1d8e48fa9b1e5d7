"""
Checkpoints of drafters: what engines read in them, how published ones differ, and what is refused.
"""
import dataclasses
import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModel

from checkpoint import (drafter_config, load_drafter, newest_checkpoint, public_drafter_config,
                        read_target_config, save_drafter, save_weights)
from fast.attention import grouped_attend
from model import DFlashDraftModel
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


def hidden_of(drafter):
    """What a drafter computes from random features and blocks, in its training form."""
    draw = random_normal()
    features = draw(2, 40, len(drafter.target_layer_ids) * HIDDEN)
    blocks = draw(2, 3, drafter.block_size, HIDDEN)
    anchors = torch.tensor([[1, 20, 33], [0, 8, 39]])
    return drafter(features, blocks, anchors, grouped_attend)

# ------------------------------------------------------------------------------------------------
# what engines read


CONTRACT = {  # config.json of Phase 1.2, spelled out: every key is read by some engine
    "architectures": ["DFlashDraftModel"], "model_type": "qwen3",
    "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
    "block_size": 16,
    "dflash_config": {
        "block_size": 16, "mask_token_id": 248077, "target_layer_ids": [3, 7, 11, 15, 19]},
    "num_target_layers": 24, "num_hidden_layers": 5, "layer_types": [FULL] * 5,
    "hidden_size": 1024, "intermediate_size": 3584, "num_attention_heads": 8,
    "num_key_value_heads": 2, "head_dim": 256, "hidden_act": "silu", "rms_norm_eps": 1e-6,
    "attention_bias": False, "attention_dropout": 0.0, "initializer_range": 0.02,
    "max_position_embeddings": 262144, "vocab_size": 248320, "tie_word_embeddings": False,
    "use_cache": True, "rope_theta": 1e7, "rope_scaling": None,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7},
    "use_sliding_window": False, "sliding_window": None, "max_window_layers": 5,
    "bos_token_id": None, "eos_token_id": 248044, "pad_token_id": 248044,
    "dtype": "bfloat16", "torch_dtype": "bfloat16"}


def test_failure_10_config_json_is_what_engines_read():
    """Failure 10: rope_theta or block_size in one place only, the target's partial rotary
    inherited, or a key that some engine reads missing."""
    target, _ = read_target_config("random:0.8b")
    config = drafter_config(
        target, num_hidden_layers=5, target_layer_ids=(3, 7, 11, 15, 19), mask_token_id=248077,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256, intermediate_size=3584)
    assert public_drafter_config(config) == CONTRACT


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


def test_failure_10_files_and_tensors_are_the_published_ones(tmp_path):
    """Failures 10 and 12: a tensor is renamed, not bf16, in a different place, or has gains near 0
    like the target's norms; a file is missing or left over; dflash.py is not model.py."""
    folder = tmp_path / "a-dflash"
    drafter = small_drafter((FULL,) * 5)
    # in this order, because SpecForge saves an optimizer's moments by index
    assert [name for name, _ in drafter.named_parameters()] == weight_names(5)
    assert save(drafter, folder) == public_drafter_config(drafter.config)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    weights = load_file(folder / "model.safetensors")
    assert sorted(weights) == sorted(weight_names(5))
    assert len(weights) == 3 + 11 * 5
    assert weights["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16, name
        if "norm" in name:
            assert abs(weight.float().mean() - 1) < 0.5, name
    files = {"config.json", "model.safetensors", "dflash.py", "README.md", "training_state.pt"}
    assert set(os.listdir(folder)) == files
    assert os.listdir(tmp_path) == ["a-dflash"]
    with open(os.path.join(ROOT, "model.py")) as f:
        assert (folder / "dflash.py").read_text() == f.read()


def test_shipped_drafter_carries_model_py():
    """The shipped dflash.py is out of date: after an edit of model.py,
    cp model.py data/nano/drafter-dflash/dflash.py"""
    with open(os.path.join(ROOT, "model.py")) as f:
        source = f.read()
    with open(os.path.join(NANO_DRAFTER, "dflash.py")) as f:
        assert f.read() == source


@pytest.mark.parametrize("layer_types, window", DRAFTERS)
@torch.no_grad()
def test_checkpoint_loads_here_and_by_auto_model(layer_types, window, tmp_path):
    """Failure 10: dflash.py needs the project around it; a window, theta or mask is lost; or a
    checkpoint changes when it is loaded and written again."""
    drafter = small_drafter(layer_types, window)
    save(drafter, tmp_path / "one-dflash")
    ours = load(tmp_path / "one-dflash")
    theirs = load_by_auto_model(tmp_path / "one-dflash")
    assert type(theirs).__name__ == "DFlashDraftModel"
    assert type(theirs) is not DFlashDraftModel
    rounded = drafter.bfloat16().float()
    for loaded in (ours, theirs):
        assert loaded.target_layer_ids == LAYER_IDS
        assert loaded.block_size == K
        assert loaded.mask_token_id == MASK
        assert torch.equal(hidden_of(loaded), hidden_of(rounded))

    save(ours, tmp_path / "two-dflash")
    for name in os.listdir(tmp_path / "one-dflash"):
        one = (tmp_path / "one-dflash" / name).read_bytes()
        assert (tmp_path / "two-dflash" / name).read_bytes() == one, name


def test_newest_checkpoint_is_the_last_complete_step(tmp_path):
    """A half-written folder, or the one that is listed last, is taken for the newest."""
    for name in ("step-000010", "step-000009", "step-000011.part", "notes"):
        (tmp_path / name).mkdir()
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "step-000010")
    (tmp_path / "config.json").write_text("{}")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path)
    assert newest_checkpoint("nowhere") == "nowhere"


def test_save_into_a_folder_that_cannot_be_written(tmp_path):
    """A run of hours ends in a traceback at its first checkpoint, or a half-written folder is taken
    for a complete one."""
    (tmp_path / "file").write_text("")
    with pytest.raises(ValueError, match="cannot write the checkpoint .*Not a directory"):
        save_drafter(small_drafter(), str(tmp_path / "file" / "a-dflash"), "")
    assert os.listdir(tmp_path) == ["file"]


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)))
def test_weights_are_readable_as_the_umask_says(tmp_path, umask, mode):
    """Weights have mode 0600, and an engine that runs as a different user cannot read them."""
    path = str(tmp_path / "model.safetensors")
    before = os.umask(umask)
    try:
        save_weights({"a": torch.ones(2)}, path)
    finally:
        os.umask(before)
    assert os.stat(path).st_mode & 0o777 == mode

# ------------------------------------------------------------------------------------------------
# published drafters, whose config.json differs from ours

PUBLISHED_IDS = (0, 2, 3, 6)
ROPE = {"rope_type": "default", "rope_theta": 1e7}
PUBLISHED = (  # heads, key-value heads, head width; layer types; keys that are missing or changed
    # rope_theta and block_size inside only, as in the 4B's
    ((4, 2, 32), (SLIDING,) * 5 + (FULL,),
     ("rope_theta", "block_size", "torch_dtype", "max_window_layers"),
     {"tie_word_embeddings": True, "pad_token_id": None}),
    # rope_theta and block_size at the top only, as in the 27B's
    ((8, 4, 16), (FULL,) * 5, ("rope_parameters",),
     {"dflash_config": {"mask_token_id": 270, "target_layer_ids": list(PUBLISHED_IDS)}}),
    ((2, 1, 64), (SLIDING, FULL), (), {"use_sliding_window": False}),
    ((2, 1, 64), (SLIDING, FULL), ("use_sliding_window",), {}),
    ((4, 2, 16), (FULL,), ("num_target_layers", "layer_types"), {"is_causal": False}),
    ((4, 2, 16), (SLIDING,), (), {"is_causal": True, "is_neox_style": True, "rope_dim": 16}),
    # keys with a usual value may be missing
    ((4, 2, 16), (FULL,),
     ("rms_norm_eps", "attention_bias", "layer_types", "hidden_act", "rope_scaling"), {}),
    # the older name of rope_parameters
    ((4, 2, 16), (FULL,), ("rope_parameters", "rope_theta"), {"rope_scaling": ROPE}),
)


@pytest.mark.parametrize("shape, layer_types, missing, changed", PUBLISHED)
@torch.no_grad()
def test_published_drafters_load_by_their_config(shape, layer_types, missing, changed, tmp_path):
    """Failure 10: as many layers as features, one head layout, one mask, or one place of a key is
    taken for granted."""
    heads, kv_heads, head_dim = shape
    config = drafter_config(
        small_config(), num_hidden_layers=len(layer_types), target_layer_ids=PUBLISHED_IDS,
        mask_token_id=270, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=48, block_size=8)
    config.layer_types = list(layer_types)
    config.use_sliding_window = SLIDING in layer_types
    config.sliding_window = 12 if config.use_sliding_window else None
    drafter = perturb(DFlashDraftModel(config), scale=5.0).bfloat16().float()
    folder = tmp_path / "e-dflash"
    public = save(drafter, folder)
    edit_json(folder / "config.json", missing, **changed)
    (folder / "dflash.py").unlink()  # not every published checkpoint has one
    loaded = load(folder)
    assert loaded.target_layer_ids == PUBLISHED_IDS
    assert loaded.block_size == 8
    assert loaded.mask_token_id == 270
    assert len(loaded.layers) == len(layer_types)

    # here, and by AutoModel from a new copy
    assert apart(hidden_of(loaded), hidden_of(drafter)) < 1e-5
    public["pad_token_id"] = loaded.config.pad_token_id
    assert save(loaded, tmp_path / "f-dflash") == public
    theirs = load_by_auto_model(tmp_path / "f-dflash")
    assert torch.equal(hidden_of(theirs), hidden_of(loaded))


@pytest.mark.parametrize("pad_token_id, expected", ((8, 8), (0, 0), (None, 7)))
def test_drafter_follows_its_target_in_all_that_they_share(tmp_path, pad_token_id, expected):
    """Failure 10: an eps, a theta, a context length or a padding token is not the target's, or is
    lost on the way to config.json and back."""
    target = dataclasses.replace(
        small_config(), rms_norm_eps=1e-3, rope_theta=5e5, max_position_embeddings=777,
        eos_token_id=7, pad_token_id=pad_token_id)
    config = drafter_config(
        target, num_hidden_layers=1, target_layer_ids=LAYER_IDS, mask_token_id=MASK,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96,
        block_size=8, initializer_range=0.5)
    config.attention_bias = True
    public = save(perturb(DFlashDraftModel(config), scale=5.0), tmp_path / "a-dflash")
    shared = {
        "rms_norm_eps": 1e-3, "rope_theta": 5e5, "max_position_embeddings": 777,
        "eos_token_id": 7, "pad_token_id": expected, "hidden_size": HIDDEN, "vocab_size": V,
        "num_target_layers": 8, "attention_bias": True, "initializer_range": 0.5,
        "block_size": 8}
    assert shared.items() <= public.items()
    loaded = load_drafter(str(tmp_path / "a-dflash"), target)
    assert loaded.norm.eps == loaded.layers[0].self_attn.q_norm.eps == 1e-3
    assert loaded.layers[0].self_attn.q_proj.bias is not None
    assert save(loaded, tmp_path / "b-dflash") == public

# ------------------------------------------------------------------------------------------------
# what is refused


def dflash(**change):
    """The dflash_config of the small drafter, edited. A key that becomes None is removed."""
    config = {"block_size": K, "mask_token_id": MASK, "target_layer_ids": list(LAYER_IDS)}
    config |= change
    return {"dflash_config": {name: v for name, v in config.items() if v is not None}}


REFUSED = (  # keys that are missing, keys that are changed, the reason
    # the features or the head of a different target
    ((), {"hidden_size": 128}, "hidden_size is 128, the target's 64"),
    ((), {"vocab_size": 512}, "vocab_size is 512, the target's 300"),
    ((), {"num_target_layers": 24}, "num_target_layers is 24, the target's 8"),
    ((), dflash(mask_token_id=300), "mask_token_id = 300 is not one of 300 ids"),
    ((), dflash(target_layer_ids=[0, 3, 7]), r"\(0, 3, 7\) must ascend, .* 0 .. 6"),
    # other weights than the file has
    ((), {"num_hidden_layers": 3, "layer_types": [FULL] * 3}, "layers.2.* is missing"),
    ((), {"num_hidden_layers": 1, "layer_types": [FULL]}, "layers.1.* is left over"),
    # missing and contradicting keys
    (("dflash_config",), {}, "has no dflash_config"),
    ((), dflash(mask_token_id=None), "mask_token_id"),
    ((), {"block_size": 8}, "block_size is 8 at the top and 16 inside"),
    (("block_size",), dflash(block_size=None), "block_size is None at the top and None inside"),
    ((), {"rope_theta": 10000}, "rope_theta is 10000 at the top and 1"),
    (("rope_theta", "rope_parameters"), {}, "rope_theta is None"),
    ((), {"layer_types": [SLIDING, FULL]}, "no sliding_window"),
    # what model.py does not compute
    ((), {"rope_parameters": ROPE | {"partial_rotary_factor": 0.25}}, "partial_rotary_factor"),
    ((), {"rope_parameters": ROPE | {"rope_type": "yarn"}}, "yarn"),
    (("rope_parameters",), {"rope_scaling": {"type": "yarn"}}, "yarn"),
    ((), {"hidden_act": "gelu"}, "gelu"),
    ((), {"rope_dim": 8}, "rope_dim"),
    ((), {"is_neox_style": False}, "is_neox_style"),
    ((), {"projector_type": "domino"}, "domino"),
    ((), dflash(conv_kernel_size=2), "conv_kernel_size"),
    ((), {"is_causal": True}, "is_causal = True"),
    ((), dflash(causal=True), "is_causal = True"),
    ((), {"is_causal": False, "layer_types": [SLIDING, SLIDING], "sliding_window": 4},
     "is_causal = False"),
)


@pytest.mark.parametrize("missing, changed, reason", REFUSED)
def test_drafters_that_are_refused(tmp_path, missing, changed, reason):
    """Failures 3 and 10: a drafter of a different target, or one that asks for a different
    computation, loads and silently guesses badly."""
    save(small_drafter(), tmp_path / "c-dflash")
    edit_json(tmp_path / "c-dflash" / "config.json", missing, **changed)
    with pytest.raises(ValueError, match=reason) as error:
        load(tmp_path / "c-dflash")
    assert "\n" not in str(error.value)
