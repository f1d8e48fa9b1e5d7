"""
Shared by several test files: small models, the shipped pair, files.

Small models have random gains and biases. New ones would hide a gain of w instead of 1 + w.
"""
import functools
import json
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

import fast
from tokenizer import load_tokenizer
from checkpoint import drafter_config, load_drafter, load_target
from data.nano.problems import problems
from model import DFlashDraftModel
from target import Target, TargetConfig

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
NANO = os.path.join(ROOT, "data", "nano")
NANO_TARGET = os.path.join(NANO, "target")
NANO_DRAFTER = os.path.join(NANO, "drafter-dflash")

K = 16                  # block size
V = 300                 # vocabulary of the small models
MASK = 299              # mask token of the small drafters
LAYER_IDS = (0, 3, 6)   # target layers whose outputs are the features of the small drafters
HIDDEN = 64             # channels of the small models

FULL = "full_attention"
SLIDING = "sliding_attention"
DRAFTERS = [            # layer types, and a window that is shorter or longer than a block
    ((FULL, FULL), None),
    ((SLIDING, SLIDING), 5),
    ((SLIDING, FULL), 20),
]

# ------------------------------------------------------------------------------------------------
# numbers


def random_normal(seed=0, dtype=torch.float32):
    """A function that draws normal numbers of a given shape; one seed gives one series of draws."""
    generator = torch.Generator().manual_seed(seed)
    return functools.partial(torch.randn, generator=generator, dtype=dtype)


def tokens_of(*shape, seed=0):
    """Random token ids of the small models, none of them the mask."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, V - 1, shape, generator=generator)


def apart(a, b):
    """Relative error |a - b| / |b|."""
    difference = (a.double() - b.double()).norm()
    return (difference / b.double().norm()).item()


def all_tokens(rounds):
    """The tokens of all rounds of a generation in one list."""
    tokens = []
    for one_round in rounds:
        tokens += one_round.tokens
    return tokens

# ------------------------------------------------------------------------------------------------
# small models


def small_config(shape="tied"):
    """Two shapes. "tied" is like the 0.8B. "untied" has more value heads than key heads, as
    larger sizes do, and no number in it is a default or equals another one by chance."""
    config = TargetConfig(
        vocab_size=V, hidden_size=HIDDEN, intermediate_size=96, num_hidden_layers=8,
        num_attention_heads=4, num_key_value_heads=2, head_dim=32,
        linear_num_key_heads=4, linear_num_value_heads=4,
        linear_key_head_dim=16, linear_value_head_dim=16,
        tie_word_embeddings=True, max_position_embeddings=512)
    if shape == "untied":
        config.tie_word_embeddings = False
        config.linear_num_value_heads = 8
        config.linear_value_head_dim = 24
        config.linear_conv_kernel_dim = 3
        config.rms_norm_eps = 0.01
        config.rope_theta = 1e4
        config.partial_rotary_factor = 0.5
    return config


def perturb(model, seed=0, scale=1.0):
    """Random gains and biases, and matrices that are larger by `scale`, so that every part of the
    model matters. Returns the model, frozen and in eval mode."""
    draw = random_normal(seed)
    for name, p in model.named_parameters():
        if p.dim() == 1 and "A_log" not in name:
            p.data += 0.2 * draw(p.shape)
        elif p.dim() == 2:
            p.data *= scale
    return model.eval().requires_grad_(False)


@functools.cache
def small_target(shape="tied", dtype=torch.float32):
    torch.manual_seed(0)
    return perturb(Target(small_config(shape)), scale=5.0).to(dtype)


def small_drafter(layer_types=(FULL, FULL), window=None, seed=0):
    """A drafter for small_target() with layers of the given types."""
    config = drafter_config(
        small_config(), num_hidden_layers=len(layer_types), target_layer_ids=LAYER_IDS,
        mask_token_id=MASK, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
        intermediate_size=96, block_size=K)
    config.layer_types = list(layer_types)
    config.sliding_window = window
    config.use_sliding_window = window is not None
    torch.manual_seed(seed)
    return perturb(DFlashDraftModel(config), seed, scale=5.0)


def drafting(T, A, seed=0):
    """Random features (2, T, ...), blocks (2, A, K, hidden), and ascending anchors (2, A)."""
    draw = random_normal(seed)
    features = draw(2, T, len(LAYER_IDS) * HIDDEN)
    blocks = draw(2, A, K, HIDDEN)
    anchors = draw(2, T - 1).topk(A).indices + 1
    return features, blocks, anchors.sort().values


@functools.cache
def tiny_target():
    """A target of 8 tokens, so that the joint frequencies of two tokens can be counted. It has one
    layer of each kind."""
    config = TargetConfig(
        vocab_size=8, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        layer_types=("linear_attention", "full_attention"),
        num_attention_heads=2, num_key_value_heads=1, head_dim=16,
        linear_num_key_heads=2, linear_num_value_heads=2,
        linear_key_head_dim=16, linear_value_head_dim=16, tie_word_embeddings=True)
    torch.manual_seed(0)
    return perturb(Target(config), scale=20.0)


def phase_1_2():
    """TargetConfig and drafter at the published widths. They are spelled out here, because the
    project's own table of sizes is tested too. Call it under torch.device("meta")."""
    target = TargetConfig(
        vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256,
        linear_num_key_heads=16, linear_num_value_heads=16,
        linear_key_head_dim=128, linear_value_head_dim=128, tie_word_embeddings=True)
    config = drafter_config(
        target, num_hidden_layers=5, target_layer_ids=(3, 7, 11, 15, 19), mask_token_id=248077,
        num_attention_heads=8, num_key_value_heads=2, head_dim=256, intermediate_size=3584)
    return target, DFlashDraftModel(config)

# ------------------------------------------------------------------------------------------------
# the shipped nano pair


@functools.cache
def nano():
    """The shipped target, prepared for decoding, and its tokenizer."""
    target = load_target(NANO_TARGET)
    fast.prepare_for_decoding(target)
    return target, load_tokenizer(NANO_TARGET)


@functools.cache
def shipped():
    """The shipped drafter."""
    target, _ = nano()
    return load_drafter(NANO_DRAFTER, target.config)


@functools.cache
def questions():
    """64 word problems that the pair was not trained on."""
    return [question for question, _, _ in problems("val", 64, task="words")]

# ------------------------------------------------------------------------------------------------
# files: checkpoints as others publish them, and files that are broken


def publish(folder, target, prefix="model.language_model.", shards=2, **change):
    """Write a target as its publishers do: config.json with text_config and vision_config, shards
    with an index (or one file), a vision tower, and layers of multi-token prediction. change: keys
    of text_config. Returns the text_config."""
    c = target.config
    text = dict(vars(c))
    theta = text.pop("rope_theta")
    partial_rotary_factor = text.pop("partial_rotary_factor")
    text |= {
        "model_type": "qwen3_5_text", "attn_output_gate": True, "full_attention_interval": 4,
        "hidden_act": "silu", "mamba_ssm_dtype": "float32", "mlp_only_layers": [],
        "mtp_num_hidden_layers": 1, "dtype": "bfloat16",
        "rope_parameters": {
            "mrope_interleaved": True, "mrope_section": [2, 1, 1], "rope_type": "default",
            "rope_theta": theta, "partial_rotary_factor": partial_rotary_factor}}
    text |= change
    config = {
        "architectures": ["Qwen3_5ForConditionalGeneration"], "model_type": "qwen3_5",
        "image_token_id": 7, "text_config": text, "tie_word_embeddings": c.tie_word_embeddings,
        "vision_config": {"depth": 2, "hidden_size": 8, "model_type": "qwen3_5"}}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))

    weights = public_weights(target, prefix)
    weights["model.visual.blocks.0.attn.qkv.weight"] = torch.ones(3, 2)
    weights["mtp.fc.weight"] = torch.ones(2, 3)
    if shards == 1:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
        return text
    file_of = {}
    for i, name in enumerate(weights):
        file_of[name] = f"model-{i % shards + 1:05}-of-{shards:05}.safetensors"
    index = {"metadata": {}, "weight_map": file_of}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    for file in set(file_of.values()):
        part = {name: w for name, w in weights.items() if file_of[name] == file}
        save_file(part, folder / file, {"format": "pt"})
    return text


def public_weights(target, prefix="model.language_model."):
    """Copies of a target's weights under the names of a public file; its head has no prefix."""
    weights = {}
    for name, weight in target.state_dict().items():
        if name != "lm_head.weight":
            name = prefix + name
        weights[name] = weight.clone()
    return weights


def hub_copy(cache, name, source):
    """Put a folder into a cache of the hub under a hub id, like a download."""
    home = cache / f"models--{name.replace('/', '--')}"
    (home / "refs").mkdir(parents=True)
    (home / "refs" / "main").write_text("abc")
    shutil.copytree(source, home / "snapshots" / "abc")


def nano_copy(folder, part):
    """Copy the shipped "target" or "drafter-dflash" to a folder, to be edited there."""
    return Path(shutil.copytree(os.path.join(NANO, part), folder))


def edit_json(path, remove=(), **change):
    """Change keys of a JSON file, and remove others."""
    content = json.loads(path.read_text()) | change
    for name in remove:
        del content[name]
    path.write_text(json.dumps(content))


def write_jsonl(path, rows):
    """Write rows as JSON lines; a row that is a string is written as it is. Returns the path."""
    with open(path, "w") as f:
        for row in rows:
            line = row if isinstance(row, str) else json.dumps(row)
            f.write(line + "\n")
    return path


def read_jsonl(path):
    """The rows of a file of JSON lines."""
    with open(path) as f:
        return [json.loads(line) for line in f]


def write_config(path, config, skip=()):
    """Write a configuration as a config file of train.py, without the keys in skip."""
    with open(path, "w") as f:
        for name, value in vars(config).items():
            if value is not None and name not in skip:
                f.write(f"{name} = {value!r}\n")
    return path
