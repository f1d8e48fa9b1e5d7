"""
Folders in and out: the weights of target and drafter, and the rules of their config.json.

    target = load_target("Qwen/Qwen3.5-0.8B")      # a hub id, a folder in that layout, random:0.8b
    drafter = load_drafter("data/nano/drafter-dflash", target.config)
    save_drafter(drafter, "out/my-dflash", card="# My drafter")

Every error that a user can cause is a ValueError of one line.
"""
import contextlib
import functools
import glob
import json
import os
import re
import secrets
import shutil
import socket
import threading
from dataclasses import fields, replace
from urllib.parse import urlsplit
from urllib.request import getproxies

import torch
from huggingface_hub import constants, snapshot_download
from safetensors.torch import save
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

import model
from formats.files import one_line, read_json, short, where, whole_file, write_whole
from formats.keys import drafter_keys, target_keys
from formats.weights import load_weights, stored_tensors
from model import DFlashDraftModel
from target import Target, TargetConfig

# --------------------------------------------------------------------------------------------------
# the target

# stored and used in fp32 even if the model's dtype is bf16
FP32_WEIGHTS = ("linear_attn.A_log", "linear_attn.norm.weight")


def load_target(name, device="cpu", dtype="float32"):
    """A Target, frozen and in eval mode.

    name: a folder with config.json and safetensors in the public layout; a hub id; random:SIZE for
    random weights in a published size; or random:SIZE:LAYERS for the first layers of one.
    """
    dtype = parse_dtype(device, dtype)
    config, folder = read_target_config(name)
    if folder is None:
        return random_target(config, device, dtype)

    def our_name(file_name):
        our = file_name.removeprefix("model.").removeprefix("language_model.")
        if our.startswith(("visual.", "mtp.")):  # the vision tower, multi-token prediction
            return None
        if our == "lm_head.weight" and config.tie_word_embeddings:
            return None  # a tied head is the embedding, even if the file repeats it
        return our

    stored = stored_tensors(folder, our_name, config.num_hidden_layers)
    with torch.device("meta"):  # without memory
        target = Target(config)
    return load_weights(target, folder, stored, device, dtype, fp32=FP32_WEIGHTS)


def parse_dtype(device, dtype):
    """The torch dtype of a name. ValueError if we do not run in it, or if there is no such GPU."""
    if not re.fullmatch("(cpu|cuda)(:[0-9]{1,3})?", device):
        raise ValueError(f"device = {short(device)}: use cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {short(device)}, but torch sees no GPU here: use --device=cpu")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {short(dtype)}: use float32 or bfloat16 "
                         "(fp16 overflows in the decay's gate)")
    return getattr(torch, dtype)


def read_target_config(name):
    """(TargetConfig, folder) of a folder or hub id. For random:SIZE[:LAYERS] the folder is None."""
    folder = checkpoint_folder(name)
    if folder.startswith("random:"):
        return random_target_config(folder), None
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"no config.json in {where(folder)!r}: give the folder of a Qwen3.5 "
                         "checkpoint, or a hub id")
    try:
        return parse_target_config(read_json(path)), folder
    except Exception as error:  # not JSON, keys missing or wrong
        raise ValueError(f"cannot use {where(path)}: {one_line(error, 130)}") from None


def parse_target_config(config):
    """The TargetConfig of a parsed config.json. ValueError names missing and unsupported keys."""
    keys = target_keys(config)
    if "layer_types" in keys:
        keys["layer_types"] = tuple(keys["layer_types"])
    known = {field.name for field in fields(TargetConfig)}
    try:
        ours = TargetConfig(**{key: value for key, value in keys.items() if key in known})
    except TypeError as error:
        reason = str(error).rpartition("__() ")[2]  # missing 1 required positional argument: ...
        raise ValueError(f"not a Qwen3.5 text model: {reason}") from None
    rotary_dim = int(ours.head_dim * ours.partial_rotary_factor)
    if rotary_dim == 0 or rotary_dim % 2:
        raise ValueError(f"{rotary_dim} channels rotate (head_dim times partial_rotary_factor), "
                         "but they must be pairs")
    return ours


SIZES = {}  # as published; an empty layer_types means the usual pattern
SIZES["0.8b"] = TargetConfig(
    vocab_size=248320, hidden_size=1024, intermediate_size=3584, num_hidden_layers=24,
    num_attention_heads=8, num_key_value_heads=2, head_dim=256, linear_num_key_heads=16,
    linear_num_value_heads=16, linear_key_head_dim=128, linear_value_head_dim=128,
    tie_word_embeddings=True, eos_token_id=248044, pad_token_id=248044)
SIZES["2b"] = replace(SIZES["0.8b"], hidden_size=2048, intermediate_size=6144)
SIZES["4b"] = replace(
    SIZES["0.8b"], hidden_size=2560, intermediate_size=9216, num_hidden_layers=32, layer_types=(),
    num_attention_heads=16, num_key_value_heads=4, linear_num_value_heads=32)
SIZES["9b"] = replace(
    SIZES["4b"], hidden_size=4096, intermediate_size=12288, tie_word_embeddings=False)
SIZES["27b"] = replace(  # Qwen3.6-27B has the same shape
    SIZES["9b"], hidden_size=5120, intermediate_size=17408, num_hidden_layers=64, layer_types=(),
    num_attention_heads=24, linear_num_value_heads=48)


def random_target_config(name):
    """The TargetConfig of random:SIZE or random:SIZE:LAYERS."""
    size, _, layers = name.removeprefix("random:").partition(":")
    config = SIZES.get(size.lower())
    if config is not None:
        count = config.num_hidden_layers
        if layers:
            count = int(layers) if layers.isdecimal() else 0
        if 0 < count <= config.num_hidden_layers:
            return replace(config, num_hidden_layers=count, layer_types=config.layer_types[:count])
    raise ValueError(f"target = {short(name)}: give random:SIZE or random:SIZE:LAYERS, a size of "
                     f"{', '.join(SIZES)} and no more layers than it has")


def random_target(config, device, dtype):
    """A Target whose random weights are always the same."""
    # The layers outweigh the embedding. Otherwise a tied head would repeat the last token forever.
    with torch.device("meta"):
        target = Target(config)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in target.named_parameters():
        weight_dtype = torch.float32 if name.endswith(FP32_WEIGHTS) else dtype
        weight = torch.zeros(parameter.shape, device=device, dtype=weight_dtype)
        if weight.dim() > 1:
            fan_in = weight[0].numel()
            std = 0.02 if name == "embed_tokens.weight" else fan_in ** -0.5
            weight.normal_(std=std, generator=generator)
        elif name.endswith("A_log"):
            weight.uniform_(0.01, 16, generator=generator).log_()
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            weight.fill_(1.0)
        weights[name] = weight
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False).eval()

# --------------------------------------------------------------------------------------------------
# the drafter


def load_drafter(name, target_config, device="cpu", dtype="float32"):
    """A frozen drafter from a hub id, a checkpoint folder, or the newest one of a training run."""
    folder = newest_checkpoint(checkpoint_folder(name))
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"no drafter in {where(folder)!r}: give a folder with config.json, or "
                         "train one: python train.py config/nano.py")
    try:
        keys = drafter_keys(read_json(path))
        # some published files lack these
        keys.setdefault("num_target_layers", target_config.num_hidden_layers)
        keys.setdefault("vocab_size", target_config.vocab_size)
        config = Qwen3Config(**keys)
        check_pair(config, target_config)
    except Exception as error:  # not JSON, keys missing or wrong, transformers' own checks
        raise ValueError(f"{where(folder, 30)}/config.json is not that of a drafter for this "
                         f"target: {one_line(error, 110)}") from None
    stored = stored_tensors(folder, drafter_name, config.num_hidden_layers)
    with torch.device("meta"):
        drafter = DFlashDraftModel(config)
    return load_weights(drafter, folder, stored, device, getattr(torch, dtype))


def drafter_name(file_name):
    """The name of a weight in model.py. The class of transformers names two differently."""
    name = file_name.replace("encoder.output_norm_enc.", "hidden_norm.")
    return name.replace("encoder.fc.", "fc.")


def check_pair(config, target_config):
    """ValueError if a drafter's Qwen3Config contradicts itself or does not fit a target."""
    layers = target_config.num_hidden_layers
    for key, own, wanted in (
            ("hidden_size", config.hidden_size, target_config.hidden_size),
            ("vocab_size", config.vocab_size, target_config.vocab_size),
            ("num_target_layers", config.num_target_layers, layers)):
        if own != wanted:
            raise ValueError(f"{key} is {own}, the target's {wanted}: give --target and --drafter "
                             "of one pair")
    # the last layer of a target cannot be read, because transformers returns it normed
    ids = config.dflash_config["target_layer_ids"]
    if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > layers - 2:
        raise ValueError(f"target_layer_ids = {short(tuple(ids), 30)} must ascend, differ, and be "
                         f"in 0 .. {layers - 2}, because the target has {layers} layers")
    mask_id = config.dflash_config["mask_token_id"]
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(f"mask_token_id = {mask_id} is not one of the target's "
                         f"{config.vocab_size} ids")


def drafter_config(
        target_config, *, num_hidden_layers, target_layer_ids, mask_token_id,
        num_attention_heads, num_key_value_heads, head_dim, intermediate_size,
        block_size=16, initializer_range=0.02):
    """The Qwen3Config of a new drafter. ValueError if the target does not have these layers."""
    # the target's partial rotary factor is left out, because a drafter rotates whole heads
    pad_token_id = target_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = target_config.eos_token_id
    if isinstance(pad_token_id, list):  # of several ids that end an answer
        pad_token_id = pad_token_id[0]
    config = Qwen3Config(
        block_size=block_size,
        dflash_config={"block_size": block_size, "mask_token_id": mask_token_id,
                       "target_layer_ids": list(target_layer_ids)},
        num_target_layers=target_config.num_hidden_layers,
        num_hidden_layers=num_hidden_layers,
        layer_types=["full_attention"] * num_hidden_layers,
        hidden_size=target_config.hidden_size,
        intermediate_size=intermediate_size,
        num_attention_heads=num_attention_heads,
        num_key_value_heads=num_key_value_heads,
        head_dim=head_dim,
        initializer_range=initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": target_config.rope_theta},
        rms_norm_eps=target_config.rms_norm_eps,
        vocab_size=target_config.vocab_size,
        max_position_embeddings=target_config.max_position_embeddings,
        tie_word_embeddings=False,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=pad_token_id)
    check_pair(config, target_config)
    return config


def save_drafter(drafter, folder, card, extra=None):
    """Write a checkpoint as inference engines read it.

    config.json, model.safetensors (bf16), dflash.py (a copy of model.py), and README.md (the card).
    extra: {file name: object} for torch.save. ValueError if the folder cannot be written.
    """
    # Everything is written into a new folder of a different name, which is renamed at the end. So
    # the folder appears complete or not at all, and an older one is kept until then.
    folder = os.path.normpath(folder)
    part = f"{folder}.{secrets.token_hex(8)}.part"
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        tensors[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    config = json.dumps(public_drafter_config(drafter.config), indent=2) + "\n"
    with open(model.__file__) as f:
        source = f.read()
    try:
        os.makedirs(part)
        save_weights(tensors, os.path.join(part, "model.safetensors"))
        for name, value in (extra or {}).items():
            with whole_file(os.path.join(part, name)) as f:
                torch.save(value, f)
        write_whole(os.path.join(part, "dflash.py"), source)
        write_whole(os.path.join(part, "config.json"), config)
        write_whole(os.path.join(part, "README.md"), card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except Exception as error:  # a full disk: OSError, or types of torch and safetensors
        shutil.rmtree(part, ignore_errors=True)
        raise ValueError(f"cannot write the checkpoint {where(folder)!r}: {one_line(error, 80)}. "
                         "If its disk is full, make room") from None


def public_drafter_config(c):
    """The content of config.json, from a Qwen3Config."""
    # transformers 5 would drop rope_theta from the top level, so that engines silently use 10000
    copied = (
        "num_target_layers", "num_hidden_layers", "layer_types", "hidden_size", "vocab_size",
        "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "attention_bias", "initializer_range", "max_position_embeddings",
        "eos_token_id", "pad_token_id")
    config = {key: getattr(c, key) for key in copied}
    if "causal" in c.dflash_config:  # without it, sliding layers are causal
        config["is_causal"] = c.dflash_config["causal"]  # also here, because readers differ
    is_sliding = "sliding_attention" in c.layer_types
    rope_theta = c.rope_parameters["rope_theta"]
    return config | {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        # in two places, because readers differ
        "block_size": c.dflash_config["block_size"],
        "dflash_config": dict(c.dflash_config),
        "rope_theta": rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "rope_scaling": None,
        "use_sliding_window": is_sliding,
        "sliding_window": c.sliding_window if is_sliding else None,
        "max_window_layers": c.num_hidden_layers,
        "hidden_act": "silu",
        "attention_dropout": 0.0,
        "tie_word_embeddings": False,
        "use_cache": True,
        "bos_token_id": None,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }

# --------------------------------------------------------------------------------------------------
# weights and folders


def checkpoint_folder(name):
    """The folder of a checkpoint: `name` itself, or the copy of a hub id, downloaded once."""
    name = os.fspath(name)
    is_hub_id = name.count("/") == 1 and name[0] not in "./~"  # owner/name, not a path
    if os.path.exists(name) or not is_hub_id:
        return name
    wanted = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # no pickles
    try:  # without a network, the hub's client would try again for seconds
        return snapshot_download(name, allow_patterns=wanted, local_files_only=not hub_answers())
    except Exception as error:  # offline, unknown, gated: any of a dozen exception types
        raise ValueError(f"no folder {where(name)!r}, and the hub does not give it "
                         f"({type(error).__name__}): copy it here and give its folder") from None


@functools.cache
def hub_answers(seconds=1.0):
    """Whether the hub, or the proxy in front of it, takes a connection."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(getproxies().get("https") or constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    connected = threading.Event()

    def connect():
        with contextlib.suppress(OSError):
            socket.create_connection((address.hostname, port), seconds).close()
            connected.set()

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(1.5 * seconds)
    return connected.is_set()


def newest_checkpoint(folder):
    """The folder itself if it is a checkpoint, else its last step-* folder, if it has one."""
    steps = step_folders(folder)
    if os.path.isfile(os.path.join(folder, "config.json")) or not steps:
        return folder
    return os.path.join(folder, steps[-1])


def step_folders(folder):
    """Names of the complete checkpoints of a training run, such as step-000123, oldest first.

    Other files and folders can have such a name. Only a folder with files of ours counts.
    """
    steps = []
    for name in glob.glob("step-*", root_dir=folder):
        path = os.path.join(folder, name)
        has_files = any(os.path.isfile(os.path.join(path, file))
                        for file in ("config.json", "training_state.pt"))
        if has_files and re.fullmatch("step-[0-9]{1,18}", name) and not os.path.islink(path):
            number = int(name.removeprefix("step-"))
            steps.append((number, name))
    return [name for _, name in sorted(steps)]


def save_weights(tensors, path):
    """Write a safetensors file. safetensors' save_file() would let only its owner read it, and an
    engine often runs as a different user."""
    write_whole(path, save(tensors, metadata={"format": "pt"}))
