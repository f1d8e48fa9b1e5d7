"""
Checkpoints of drafters: what engines read in them, how published ones differ, and what is refused.
"""
import argparse
import contextlib
import dataclasses
import errno
import functools
import itertools
import json
import math
import os
import re
import shutil
import types
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModel

import checkpoint
from checkpoint import (drafter_config, load_drafter, load_target, newest_checkpoint,
                        public_drafter_config, read_target_config, save_drafter, save_weights,
                        step_folders, write_whole)
from fast.attention import grouped_attend
from formats.files import one_line, printable
from formats.keys import drafter_keys, list_unknown
from model import DFlashDraftModel
from training import checkpoints
from training.checkpoints import prune_checkpoints, read_state_file, save_checkpoint
from training.guard import GradientGuard
from tests.common import (FULL, HIDDEN, K, LAYER_IDS, MASK, NANO_DRAFTER, ROOT, SLIDING,
                          apart, edit_json, hub_copy, perturb, publish,
                          random_normal, small_config, small_drafter, small_target)


def save(drafter, folder):
    """Write a checkpoint and return its config.json, parsed."""
    save_drafter(drafter, str(folder), "# card\n", {"training_state.pt": {"step": 1}})
    return json.loads((folder / "config.json").read_text())


def load(folder):
    return load_drafter(str(folder), small_config())


def hidden_of(drafter):
    """The output of a drafter in its training form, on random features and blocks."""
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


@pytest.mark.parametrize("pad_token_id, public", ((248044, 248044), (0, 0), (None, 248044)))
def test_failure_10_config_json_is_what_engines_read(pad_token_id, public):
    """Failure 10: rope_theta or block_size in one place only, the target's partial rotary
    inherited, a key that some engine reads missing, or an eps, a theta, a context length, or a
    padding token that is not the target's."""
    target, _ = read_target_config("random:0.8b")
    own = {"rms_norm_eps": 1e-3, "rope_theta": 5e5, "max_position_embeddings": 777}
    shape = {"num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 256}
    ids = {"target_layer_ids": (3, 7, 11, 15, 19), "mask_token_id": 248077}
    for change in ({}, own):
        config = drafter_config(
            dataclasses.replace(target, pad_token_id=pad_token_id, **change),
            num_hidden_layers=5, intermediate_size=3584, **shape, **ids)
        expected = CONTRACT | {"pad_token_id": public} | change
        theta = {"rope_type": "default", "rope_theta": expected["rope_theta"]}
        assert public_drafter_config(config) == expected | {"rope_parameters": theta}


LAYER_WEIGHTS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "self_attn.q_norm", "self_attn.k_norm", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    "input_layernorm", "post_attention_layernorm")


def test_failure_10_files_and_tensors_are_the_published_ones(tmp_path):
    """Failures 10 and 12: a tensor is renamed, not bf16, in a different place, or has gains near 0
    like the target's norms; a file is missing or left over; dflash.py is not model.py."""
    folder = tmp_path / "a-dflash"
    drafter = small_drafter((FULL,) * 5)
    names = [f"layers.{i}.{part}.weight" for i in range(5) for part in LAYER_WEIGHTS]
    names += ["norm.weight", "fc.weight", "hidden_norm.weight"]
    # in this order, because SpecForge saves an optimizer's moments by index
    assert [name for name, _ in drafter.named_parameters()] == names
    assert save(drafter, folder) == public_drafter_config(drafter.config)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert f.metadata() == {"format": "pt"}
    weights = load_file(folder / "model.safetensors")
    assert sorted(weights) == sorted(names)
    assert weights["fc.weight"].shape == (HIDDEN, 3 * HIDDEN)
    for name, weight in weights.items():
        assert weight.dtype == torch.bfloat16, name
        if "norm" in name:
            assert abs(weight.float().mean() - 1) < 0.5, name
    files = {"config.json", "model.safetensors", "dflash.py", "README.md", "training_state.pt"}
    assert set(os.listdir(folder)) == files
    assert os.listdir(tmp_path) == ["a-dflash"]
    for copy in (folder / "dflash.py", Path(NANO_DRAFTER, "dflash.py")):
        assert copy.read_text() == Path(ROOT, "model.py").read_text(), "cp model.py here"


def test_newest_checkpoint_is_the_last_complete_step(tmp_path):
    """A half-written folder, a planted name, or the last one as text is taken for the newest."""
    steps = ["step-000009", "step-999999", "step-1000000"]  # as text, 1000000 is before 999999
    for name in (*steps, "step-9999999.part", "step-9999999x", "step-", "notes"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    (tmp_path / "step-2000000").mkdir()
    (tmp_path / "step-2000001").write_text("")
    (tmp_path / "step-2000002").symlink_to(tmp_path / "notes")
    assert step_folders(str(tmp_path)) == steps
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path / "step-1000000")
    (tmp_path / "config.json").write_text("{}")
    assert newest_checkpoint(str(tmp_path)) == str(tmp_path)
    assert newest_checkpoint("nowhere") == "nowhere"


@pytest.mark.parametrize("umask, mode", ((0o022, 0o644), (0o077, 0o600)))
def test_weights_are_readable_as_the_umask_says(tmp_path, umask, mode):
    """Weights have mode 0600, and an engine that runs as a different user cannot read them."""
    before = os.umask(umask)
    save_weights({"a": torch.ones(2)}, str(tmp_path / "a"))
    os.umask(before)
    assert os.stat(tmp_path / "a").st_mode & 0o777 == mode

# ------------------------------------------------------------------------------------------------
# published drafters, whose config.json differs from ours

PUBLISHED_IDS = (0, 2, 3, 6)
ROPE = {"rope_type": "default", "rope_theta": 1e7}
PUBLISHED = (  # heads, key-value heads, head width; layer types; keys that are missing or changed
    ((4, 2, 32), (FULL, FULL), (), {}),
    ((4, 2, 16), (SLIDING, SLIDING), (), {}),
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
    taken for granted; dflash.py needs the project around it; a checkpoint changes when it is loaded
    and written again."""
    heads, kv_heads, head_dim = shape
    config = drafter_config(
        small_config(), num_hidden_layers=len(layer_types), target_layer_ids=PUBLISHED_IDS,
        mask_token_id=270, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=head_dim, intermediate_size=48, block_size=8)
    config.layer_types = list(layer_types)
    config.attention_bias = head_dim == 64
    config.use_sliding_window = SLIDING in layer_types
    window = 5 if head_dim == 16 else 12  # shorter or longer than a block
    config.sliding_window = window if config.use_sliding_window else None
    drafter = perturb(DFlashDraftModel(config), scale=5.0).bfloat16().float()
    folder = tmp_path / "e-dflash"
    public = save(drafter, folder)
    edit_json(folder / "config.json", missing, **changed)
    (folder / "dflash.py").unlink()  # not every published checkpoint has one
    loaded = load(folder)
    assert (loaded.target_layer_ids, loaded.block_size, loaded.mask_token_id) == (
        PUBLISHED_IDS, 8, 270)

    # here, and by AutoModel from a new copy
    assert apart(hidden_of(loaded), hidden_of(drafter)) < 1e-5
    public["pad_token_id"] = loaded.config.pad_token_id
    if "is_causal" in changed:
        public["is_causal"] = changed["is_causal"]
        public["dflash_config"]["causal"] = changed["is_causal"]
    assert save(loaded, tmp_path / "f-dflash") == public
    theirs = AutoModel.from_pretrained(
        str(tmp_path / "f-dflash"), trust_remote_code=True, dtype=torch.float32).eval()
    assert type(theirs).__name__ == "DFlashDraftModel"
    assert type(theirs) is not DFlashDraftModel
    assert torch.equal(hidden_of(theirs), hidden_of(loaded))
    for name in ("model.safetensors", "README.md"):
        assert (folder / name).read_bytes() == (tmp_path / "f-dflash" / name).read_bytes()


# ------------------------------------------------------------------------------------------------
# what is refused


def dflash(**change):
    """The dflash_config of the small drafter, edited. A key that becomes None is removed."""
    config = {"block_size": K, "mask_token_id": MASK, "target_layer_ids": list(LAYER_IDS)}
    config |= change
    return {"dflash_config": {name: v for name, v in config.items() if v is not None}}


def small_folder(tmp_path, missing=(), **changed):
    """A checkpoint of the small drafter with an edited config.json."""
    folder = tmp_path / "c-dflash"
    save(small_drafter(), folder)
    edit_json(folder / "config.json", missing, **changed)
    return folder


def check_refusal(error, reason):
    """An error of one printable line that fits on a screen and names the reason."""
    text = str(error.value)
    assert reason in text
    assert len(text) < 200
    assert text.isprintable()


NAN = math.nan
REFUSED = (  # keys that are missing, keys that are changed, the reason
    # the features or the head of a different target
    ((), {"hidden_size": 128}, "hidden_size is 128, the target's 64"),
    ((), {"num_target_layers": 24}, "num_target_layers is 24, the target's 8"),
    ((), dflash(num_target_layers=24), "num_target_layers is 8 in one place and 24 in another"),
    ((), dflash(mask_token_id=300), "mask_token_id = 300 is not one of the target's 300 ids"),
    ((), dflash(target_layer_ids=[0, 3, 7]), "(0, 3, 7) must ascend, differ, and be in 0 .. 6"),
    # other weights than the file has
    ((), {"num_hidden_layers": 3, "layer_types": [FULL] * 3}, "layers.2 is missing"),
    ((), {"num_hidden_layers": 10**5, "layer_types": None}, "config.json has 100000 layers"),
    ((), {"num_hidden_layers": 1, "layer_types": [FULL]}, "11 tensors of"),
    # missing and contradicting keys
    (("dflash_config",), {}, "it has no mask_token_id"),
    ((), {"block_size": 8}, "block_size is 8 in one place and 16 in another"),
    (("rope_theta", "rope_parameters"), {}, "it has no rope_theta"),
    ((), {"layer_types": [SLIDING, FULL]}, "no sliding_window"),
    ((), {"is_causal": True} | dflash(causal=False), "causal is True in one place and False"),
    (("rms_norm_eps",), {"speculation_type": "dflash"}, "it has no rms_norm_eps"),
    # numbers and lists that do not fit each other
    ((), {"num_attention_heads": 3}, "3 must be a multiple of num_key_value_heads = 2"),
    ((), {"head_dim": 15}, "head_dim = 15 must be even"),
    ((), {"layer_types": [FULL, 3]}, "layer_types contains 3"),
    ((), {"layer_types": [FULL, "linear_attention"]}, "unknown kinds: ['linear_attention']"),
    ((), {"layer_types": [FULL] * 3}, "layer_types has 3 entries for 2 layers"),
    ((), dflash(target_layer_ids=list(range(10**5))), "target_layer_ids = (0, 1, 2"),
    ((), {"dflash_config": [1]}, "dflash_config = [1] has no keys"),
    ((), {"hidden_act": "\x1b[2J" + 300 * "x"}, r"hidden_act = '\x1b[2Jxxx"),
)


@pytest.mark.parametrize("missing, changed, reason", REFUSED)
def test_drafters_that_are_refused(tmp_path, monkeypatch, missing, changed, reason):
    """Failures 3 and 10: a drafter of a different target, or one that asks for a different
    computation, loads and silently guesses badly; a traceback; 100,000 layers are built."""
    folder = small_folder(tmp_path, missing, **changed)
    if "tensors of" not in reason:
        monkeypatch.setattr(checkpoint, "DFlashDraftModel", None)
    with pytest.raises(ValueError) as error:
        load(folder)
    check_refusal(error, reason)


# values that no drafter can have here: of a wrong type, out of range, or for a computation that
# model.py does not have
NOT_HERE = {
    "mask_token_id": (3.0, True, "3", -1), "block_size": ("16", 0, True),
    "target_layer_ids": (3, [], [0, "3"]), "num_hidden_layers": ("2", 0), "hidden_size": (-64,),
    "num_attention_heads": (0,), "rms_norm_eps": (NAN, 0), "rope_theta": (NAN, math.inf, 10**400),
    "sliding_window": (-5,), "layer_types": (FULL,), "attention_bias": ("false",),
    "is_causal": (1,), "partial_rotary_factor": (0.25,), "rope_type": ("yarn",),
    "type": ("linear",), FULL: (ROPE,), "factor": (2,), "hidden_act": ("gelu",), "rope_dim": (8,),
    "is_neox_style": (False,), "rope_is_neox_style": (False,), "projector_type": ("domino",),
    "attention_mode": ("mla",), "input_embedding_scale": (2, 2.0), "output_multiplier": (0.2,),
    "sample_from_anchor": (True,), "query_zero_predicts_next": (True,), "conv_kernel_size": (2,),
    "attention_sink_bias": (True,), "final_logit_softcapping": (20.0,), "model_type": ("llama",),
    "architectures": (["DFlash2DraftModel"],), "quantization_config": ({"bits": 4},)}


@pytest.mark.parametrize("section", ("top", "dflash_config", "rope_parameters", "rope_scaling"))
@pytest.mark.parametrize("key", NOT_HERE)
def test_keys_are_checked_in_every_section(section, key):
    """A key that changes the computation is ignored because it is in a different section."""
    for value in NOT_HERE[key]:
        change = {key: value}
        if section != "top":
            change = {section: (CONTRACT[section] or {}) | change}
        with pytest.raises(ValueError) as error:
            drafter_keys(CONTRACT | change)
        check_refusal(error, f"{key} = ")


FLAT = {"mask_token_id": MASK, "target_layer_ids": list(LAYER_IDS)}
HARMLESS = (  # keys that are missing, keys that are changed
    ((), {"projector_type": "dflash", "attention_mode": "gqa"}),
    ((), dflash(projector_type="dflash", attention_mode="gqa", num_target_layers=8)),
    ((), {"is_causal": None, "rope_dim": None, "output_multiplier": None, "layer_types": None}),
    ((), {"input_embedding_scale": 1.0, "output_multiplier": 1, "sample_from_anchor": False}),
    ((), {"rope_scaling": {"rope_type": "default"}, "rope_is_neox_style": True, "rope_dim": 16}),
    ((), {"architectures": None, "model_type": None, "num_target_layers": None, "head_dim": 16}),
    ((), {"eos_token_id": [7, 8], "pad_token_id": None, "is_causal": False}),
    (("dflash_config",), FLAT | {"speculation_type": "dflash"}),
    (("dflash_config", "vocab_size", "num_target_layers", "architectures"), FLAT),
)


@pytest.mark.parametrize("missing, changed", HARMLESS)
@torch.no_grad()
def test_harmless_keys_are_accepted(tmp_path, capsys, missing, changed):
    """A key with its neutral value, null, or in a different place is refused, or reported."""
    loaded = load(small_folder(tmp_path, missing, **changed))
    assert torch.equal(hidden_of(loaded), hidden_of(small_drafter().bfloat16().float()))
    assert capsys.readouterr().err == ""


def test_unknown_keys_are_listed_in_one_line(tmp_path, capsys):
    """A key that nobody here knows, such as one of next year, is ignored in silence."""
    list_unknown.cache_clear()
    keys = {"\x1b[2Jx" + 300 * "y": 1, "zeta": [1], "nothing": None}
    load(small_folder(tmp_path, **keys))
    line = capsys.readouterr().err
    assert line.startswith("note: 2 keys of the drafter's config.json are unknown and ignored: ")
    assert len(line) < 200
    assert line[:-1].isprintable()


def sees(layer_type, window, is_causal, query, key):
    """Whether position `query` of a block attends to position `key` of the sequence."""
    if is_causal is None:
        is_causal = layer_type == SLIDING
    if is_causal and key > query:
        return False
    return layer_type == FULL or abs(query - key) < window


@pytest.mark.parametrize("place", ("top", "causal", "is_causal"))
@pytest.mark.parametrize("layer_type, is_causal", (
    (FULL, None), (FULL, True), (FULL, False), (SLIDING, None), (SLIDING, True), (SLIDING, False)))
def test_is_causal_decides_for_all_layers(tmp_path, place, layer_type, is_causal):
    """is_causal is ignored, or the mask of training is not that of decoding: in z-lab's code, 4 of
    7 guesses change with is_causal on full layers, and 1 without it on sliding ones."""
    window = 5
    save(small_drafter((layer_type,), window), tmp_path / "a-dflash")
    keys = {"is_causal": is_causal} if place == "top" else dflash(**{place: is_causal})
    edit_json(tmp_path / "a-dflash" / "config.json", **keys)
    drafter = load(tmp_path / "a-dflash")
    saved = save(drafter, tmp_path / "b-dflash")
    assert saved.get("is_causal") == saved["dflash_config"].get("causal") == is_causal

    n = 12      # the anchor
    draw = random_normal()
    inputs = draw(1, n, len(LAYER_IDS) * HIDDEN), draw(1, K, HIDDEN)
    features, block = [x.requires_grad_() for x in inputs]
    cache = drafter.new_cache(1, n + K)
    drafter.write_context(features, cache, torch.tensor([0]))
    decoded = drafter.decode_block(block, [(k.clone(), v.clone()) for k, v in cache],
                                   torch.tensor([n]))
    trained = drafter(features, block[:, None], torch.tensor([[n]]))[:, 0]
    assert apart(decoded, trained) < 1e-5
    for k in range(K):
        gradients = torch.autograd.grad(trained[0, k].sum(), (features, block), retain_graph=True)
        moved = torch.cat([gradient[0].abs().sum(-1) > 0 for gradient in gradients])
        expected = [sees(layer_type, window, is_causal, n + k, key) for key in range(n + K)]
        assert moved.tolist() == expected, k


@torch.no_grad()
def test_drafters_of_the_class_in_transformers_load(tmp_path):
    """The flat format: its keys are read, but its sliding layers are not causal, and two of its
    weights have different names."""
    # newer than the oldest transformers that we run with
    muse = pytest.importorskip("transformers.models.muse_glimmer_assistant")
    torch.manual_seed(0)
    config = muse.MuseGlimmerAssistantConfig(
        hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, rms_norm_eps=1e-3, sliding_window=40,
        rope_parameters={"rope_type": "default", "rope_theta": 5e5}, layer_types=[SLIDING, FULL],
        block_size=K, mask_token_id=MASK, target_layer_ids=list(LAYER_IDS), bos_token_id=None,
        eos_token_id=1, pad_token_id=0)
    theirs = perturb(muse.MuseGlimmerAssistantModel(config), scale=5.0)
    theirs.save_pretrained(tmp_path)
    ours = load(tmp_path)
    draw = random_normal()
    features, block = draw(1, 9, len(LAYER_IDS) * HIDDEN), draw(1, K, HIDDEN)
    expected = theirs(block, features).last_hidden_state
    assert apart(ours(features, block[:, None], torch.tensor([[9]]))[:, 0], expected) < 1e-5

# ------------------------------------------------------------------------------------------------
# targets


TARGETS = (  # a change of text_config, and the reason or None if it is harmless
    ({"attn_output_gate": False}, "attn_output_gate = False"),
    ({"output_gate_type": "sigmoid"}, "output_gate_type = 'sigmoid'"),
    ({"use_sliding_window": True}, "use_sliding_window = True"),
    ({"use_sliding_window": False, "sliding_window": None, "is_causal": True}, None),
    ({"rope_scaling": {"type": "yarn", "factor": 4}}, "type = 'yarn'"),
    ({"rope_parameters": {FULL: {}}}, "full_attention"),
    ({"model_type": "llama"}, "model_type"),
    ({"rope_theta": NAN}, "rope_theta = nan"),
    ({"rope_parameters": {"partial_rotary_factor": 0.03}}, "0 channels rotate"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id = '2'"),
    ({"eos_token_id": [5, 6], "pad_token_id": None}, None),
    ({"full_attention_interval": 3}, "full_attention_interval = 3 is not supported, only 4"),
    ({"linear_key_head_dim": None}, "linear_key_head_dim"),
    ({"rms_norm_eps": None, "rope_theta": None, "layer_types": None}, None),
    ({"num_hidden_layers": 10**5, "layer_types": None}, "config.json has 100000 layers"),
)


@pytest.mark.parametrize("change, reason", TARGETS)
def test_targets_that_are_refused(tmp_path, monkeypatch, change, reason):
    """Wrong results without a word: rope_theta NaN gives tau 15.75 on exclamation marks."""
    publish(tmp_path, small_target(), shards=1, **change)
    if reason is None:
        target = load_target(str(tmp_path))
        assert target.config.layer_types == small_config().layer_types
        drafter_config(
            target.config, num_hidden_layers=1, target_layer_ids=LAYER_IDS, mask_token_id=MASK,
            num_attention_heads=4, num_key_value_heads=2, head_dim=16, intermediate_size=96)
        return
    monkeypatch.setattr(checkpoint, "Target", None)
    with pytest.raises(ValueError) as error:
        load_target(str(tmp_path))
    check_refusal(error, reason)

# ------------------------------------------------------------------------------------------------
# weight files


def with_tensors(*prefix, **tensors):
    """A function that adds tensors to a drafter's weights, or removes those with a prefix."""
    def edit(folder):
        weights = load_file(folder / "model.safetensors")
        kept = {name: w for name, w in weights.items() if not name.startswith(prefix)}
        save_file(kept | tensors, folder / "model.safetensors")
    return edit


def norm(dtype):
    """Change the dtype of a weight."""
    return with_tensors(**{"norm.weight": torch.ones(HIDDEN).to(dtype)})


def in_files(folder, *files):
    """An index that names these files."""
    index = {"weight_map": {f"tensor {i}": file for i, file in enumerate(files)}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def with_two_copies(folder):
    save_file({"norm.weight": torch.ones(HIDDEN)}, folder / "more.safetensors")
    in_files(folder, "model.safetensors", "more.safetensors")


def outside(folder):
    """Move the weights to the folder above."""
    return (folder / "model.safetensors").rename(folder.parent / "w.safetensors")


def as_link(folder):
    (folder / "model.safetensors").symlink_to(outside(folder))


def as_fifo(folder):
    outside(folder)
    os.mkfifo(folder / "model.safetensors")


MANY = {f"\x1b[2J{i}.{300 * 'x'}": torch.ones(1) for i in range(1000)}
WEIGHTS = (  # how the folder is broken, the reason
    (norm(torch.int8), "'norm.weight' is I8; weights must be"),
    (norm(torch.float8_e4m3fn), "'norm.weight' is F8_E4M3"),
    (norm(torch.float64), "'norm.weight' is F64"),
    (with_tensors(**MANY), "1000 tensors of"),
    (with_tensors("layers.0."), "11 tensors of"),
    (with_two_copies, "'norm.weight' is in the checkpoint twice"),
    (as_link, "outside of the checkpoint's folder"),
    (as_fifo, "no such file"),
    (lambda folder: outside(folder), "no such file"),
    (lambda folder: in_files(folder, f"../{outside(folder).name}"), "it is outside"),
    (lambda folder: in_files(folder, 3), "cannot load"),
    (lambda folder: (folder / "model.safetensors").write_bytes(b"half"), "cannot load"),
    (lambda folder: (folder / "config.json").write_text("[" * 10**5), "nested too deeply"),
    (lambda folder: (folder / "config.json").write_text("[]"), "contains a list"),
)


@pytest.mark.parametrize("breaks, reason", WEIGHTS)
def test_weight_files_that_are_refused(tmp_path, breaks, reason):
    """Integers are cast to weights; a file outside the folder is read; a FIFO hangs; the message
    has 16,000 characters, or clears the screen."""
    folder = small_folder(tmp_path)
    breaks(folder)
    with pytest.raises(ValueError) as error:
        load(folder)
    check_refusal(error, reason)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32))
def test_links_of_the_hub_and_plain_dtypes_load(tmp_path, dtype):
    """A download of the hub, whose files are links to blobs, or fp16 weights are refused."""
    folder = small_folder(tmp_path)
    norm(dtype)(folder)
    hub_copy(tmp_path, "some/drafter-dflash", folder)
    home = tmp_path / "models--some--drafter-dflash"
    (home / "blobs").mkdir()
    copy = home / "snapshots" / "abc" / "model.safetensors"
    copy.rename(home / "blobs" / "0123")
    copy.symlink_to("../../blobs/0123")
    loaded = load(copy.parent)
    assert torch.equal(hidden_of(loaded), hidden_of(load(folder)))

# ------------------------------------------------------------------------------------------------
# files that are written, text that is printed


def test_files_are_written_whole_and_not_through_links(tmp_path):
    """A planted link directs a file of ours to a file of the user, a name can be guessed, or a
    write that fails leaves half of a file."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("a", "a.tmp", "a.part"):
        (tmp_path / name).symlink_to(victim)
    write_whole(str(tmp_path / "a"), "text \u20ac")
    write_whole(str(tmp_path / "b"), b"bytes")
    assert victim.read_text() == "mine"
    assert (tmp_path / "a").read_text() == "text \u20ac"
    assert (tmp_path / "b").read_bytes() == b"bytes"
    with pytest.raises(TypeError):
        write_whole(str(tmp_path / "b"), 3)
    assert (tmp_path / "b").read_bytes() == b"bytes"
    assert sorted(os.listdir(tmp_path)) == ["a", "a.part", "a.tmp", "b", "victim"]


def test_terminals_do_not_obey_text_from_outside():
    """An escape sequence or a carriage return hides what was printed; a surrogate cannot be
    printed at all; a message fills the screen."""
    assert printable("a\tb\n\u00e9 \U0001f469\u200d\U0001f469") == (
        "a\tb\n\u00e9 \U0001f469\u200d\U0001f469")
    assert printable("\x1b[2J\r\x7f\x9b\u202e\ud800\u2028") == (
        r"\x1b[2J\r\x7f\x9b\u202e\ud800\u2028")
    assert one_line(ValueError("a\n  b\x00")) == r"a b\x00"
    assert len(one_line("x" * 500)) == 150


def test_every_from_pretrained_refuses_code():
    """transformers asks whether to run a folder's code, or runs it."""
    calls = []
    for folder in ("", "benchmarks", "data", "fast", "formats", "training"):
        for path in Path(ROOT, folder).glob("*.py"):
            lines = path.read_text().splitlines()
            calls += [line for line in lines if ".from_pretrained(" in line]
    assert len(calls) >= 2
    own = [line for line in calls if "trust_remote_code=False" not in line]
    assert all("AutoModel" in line or "`" in line for line in own), own

# ------------------------------------------------------------------------------------------------
# checkpoints of a run


def training_state(**change):
    """The content of a small training_state.pt, edited."""
    return {
        "global_step": 3, "args": argparse.Namespace(ranks=1, grad_accum_steps=2),
        "optimizer_state_dict": {"state": {0: {"step": torch.tensor(3.0)}}},
        "master_weights": {"a": torch.ones(2)}, "gradient_guard": vars(GradientGuard())} | change


@pytest.mark.parametrize("change, reason", (
    ({"global_step": "6"}, "global_step = '6': use an integer"),
    ({"global_step": -1}, "global_step = -1"),
    ({"args": argparse.Namespace(ranks=True)}, "ranks = True"),
    ({"args": argparse.Namespace(grad_accum_steps="x")}, "grad_accum_steps = 'x'"),
    ({"gradient_guard": {"usual_norm": NAN}}, "usual_norm = nan"),
    ({"gradient_guard": {"skipped": 1.0}}, "skipped = 1.0"),
    ({"gradient_guard": {"other": 1}}, "other"),
    ({"master_weights": {"a": torch.ones(2, dtype=torch.int8)}}, "moment is torch.int8"),
    ({"master_weights": {"a": torch.tensor([NAN])}}, "not finite"),
    ({"optimizer_state_dict": {"state": {}}, "master_weights": 3}, "cannot read"),
    ({"optimizer_state_dict": {"state": {0: {"step": torch.tensor(-1.0)}}}}, "step = -1.0"),
    ({"optimizer_state_dict": 3}, "cannot read"),
    ({"draft_state_dict": {}}, "specforge export --to hf"),
    ({"args": functools.partial(os.mkdir)}, "cannot read"),  # a pickle that calls a function
))
def test_training_states_that_are_refused(tmp_path, change, reason):
    """A number of a broken or foreign training_state.pt is used, or raises later."""
    torch.save(training_state(), tmp_path / "training_state.pt")
    assert read_state_file(str(tmp_path))["global_step"] == 3
    torch.save(training_state(**change), tmp_path / "training_state.pt")
    with pytest.raises(ValueError) as error:
        read_state_file(str(tmp_path))
    check_refusal(error, reason)


def run_to_save(folder):
    """The parts of a Run that save_checkpoint() needs."""
    drafter = small_drafter()
    config = types.SimpleNamespace(out_dir=str(folder), target="t", data="d", num_layers=2,
                                   block_size=K, target_layer_ids=LAYER_IDS)
    return types.SimpleNamespace(
        config=config, step=0, total_steps=9, drafter=drafter, guard=GradientGuard(),
        optimizer=torch.optim.AdamW(drafter.parameters()))


def test_planted_names_do_not_stop_a_run(tmp_path):
    """A file step-000000 or a folder step-zzz0 in out_dir stops the run after its save, or pruning
    deletes the new checkpoint."""
    run = run_to_save(tmp_path)
    planted = ["step-000000", "step-000001.part", "step-1.0123456789abcdef.part"]
    for name in planted:
        (tmp_path / name).write_text("file")
    for name in ("step-zzz0", "step-000002", "step-000001", "step-000001.old"):
        (tmp_path / name).mkdir()
    for run.step in (0, 1, 2, 3):
        folder = save_checkpoint(run)
        assert newest_checkpoint(str(tmp_path)) == folder
        assert len(os.listdir(folder)) == 5
    assert step_folders(str(tmp_path)) == ["step-000001", "step-000002", "step-000003"]

    # checkpoints of a later step, which somebody has put there
    for name in ("step-000007", "step-000008", "step-000009"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
    prune_checkpoints(str(tmp_path), "step-000003")
    assert step_folders(str(tmp_path))[0] == "step-000003"
    assert (tmp_path / "step-zzz0").is_dir()


class Killed(BaseException):
    """Nothing catches it, like kill -9."""


def ends_at(call, owner, name, error):
    """A function whose n-th call does half of its work and raises the error."""
    function = getattr(owner, name)
    calls = itertools.count(1)

    def ending(*args, **kwargs):
        if next(calls) != call:
            return function(*args, **kwargs)
        if name == "save":
            args[1].write(b"half of a file")
        if name == "rmtree":  # only the state that a run resumes from is gone
            Path(args[0], "training_state.pt").unlink(missing_ok=True)
        raise error
    return ending


@pytest.mark.parametrize("owner, name, error", (
    (torch, "save", Killed), (torch, "save", OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))),
    (os, "replace", Killed), (shutil, "rmtree", Killed)))
def test_resume_after_a_save_that_was_not_finished(monkeypatch, tmp_path, owner, name, error):
    """A half-written folder loads, or an old one is deleted before the new one is complete. Here
    each call that writes, renames, or deletes is killed once, or the disk is full."""
    monkeypatch.setattr(checkpoints, "KEEP_CHECKPOINTS", 1)
    for call in itertools.count(1):
        out_dir = tmp_path / str(call)
        run = run_to_save(out_dir)
        saved = 0
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(owner, name, ends_at(call, owner, name, error))
            try:
                for run.step in (1, 2):
                    save_checkpoint(run)
                    saved = run.step
            except ValueError as full:
                assert re.match("cannot write .*step-0.* No space left.*make room", str(full))
        steps = step_folders(str(out_dir))
        assert all(len(os.listdir(out_dir / step)) == 5 for step in steps), "half a checkpoint"
        newest = 0
        if steps:
            newest = read_state_file(str(out_dir / steps[-1]))["global_step"]
        assert newest in (saved, saved + 1)
        if saved == 2:
            break
        # the next save deletes the remains
        run.step = 3
        save_checkpoint(run)
        assert os.listdir(out_dir) == ["step-000003"]
    assert call > 2
