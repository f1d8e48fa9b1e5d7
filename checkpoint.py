"""
Folders in and out: the weights of target and drafter, and the rules of their config.json.

    target = load_target("Qwen/Qwen3.5-0.8B")      # a hub id, a folder in that layout, random:0.8b
    drafter = load_drafter("data/nano/drafter-dflash", target.config)
    save_drafter(drafter, "out/my-dflash", card="# My drafter")

Every error that a user can cause is a ValueError of one line.
"""
import glob
import json
import os
import shutil
from dataclasses import fields, replace

import torch
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

import model
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

    with torch.device("meta"):  # without memory
        target = Target(config)
    return load_weights(target, folder, device, dtype, our_name=our_name, fp32=FP32_WEIGHTS)


def parse_dtype(device, dtype):
    """The torch dtype of a name. ValueError if we do not run in it, or if there is no such GPU."""
    if device.split(":")[0] not in ("cpu", "cuda"):
        raise ValueError(f"device = {device!r:.60}: use cpu or cuda")
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU here: use --device=cpu")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r}: use float32 or bfloat16 "
                         "(fp16 overflows in the decay's gate)")
    return getattr(torch, dtype)


def read_target_config(name):
    """(TargetConfig, folder) of a folder or hub id. For random:SIZE[:LAYERS] the folder is None."""
    if name.startswith("random:"):
        return random_target_config(name), None
    folder = checkpoint_folder(name)
    path = os.path.join(folder, "config.json")
    if not os.path.isfile(path):
        raise ValueError(f"no config.json in {folder!r}: give the folder of a Qwen3.5 checkpoint, "
                         "or a hub id")
    try:
        with open(path) as f:
            return parse_target_config(json.load(f)), folder
    except (ValueError, TypeError, AttributeError, ZeroDivisionError) as error:
        raise ValueError(f"cannot use {path}: {one_line(error)}") from None


def parse_target_config(config):
    """The TargetConfig of a parsed config.json. ValueError names missing and unsupported keys."""
    # One flat dict. Multimodal files nest the text model's keys, and all files nest those of rope.
    keys = dict(config)
    keys |= config.get("text_config") or {}
    keys |= keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if keys.get("num_experts") or "moe" in str(keys.get("model_type")):
        raise ValueError("mixture-of-experts targets are not supported, only dense ones")
    supported = {"rope_type": "default", "hidden_act": "silu", "quantization_config": None}
    for key, value in supported.items():
        if keys.get(key, value) != value:
            raise ValueError(f"{key} = {keys[key]!r} is not supported, only {value!r}")
    if "layer_types" in keys:
        keys["layer_types"] = tuple(keys["layer_types"])
    # keys that TargetConfig does not know do not affect the computation
    known = {field.name for field in fields(TargetConfig)}
    try:
        return TargetConfig(**{key: value for key, value in keys.items() if key in known})
    except TypeError as error:
        raise ValueError(f"config.json is not that of a Qwen3.5 text model: {error}") from None


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
    raise ValueError(f"target = {name!r}: give random:SIZE or random:SIZE:LAYERS with a size of "
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
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"no drafter in {folder!r}: give a folder with config.json, or train one: "
                         "python train.py config/nano.py")
    try:
        config = read_drafter_config(folder)
        if getattr(config, "num_target_layers", None) is None:  # some published files lack it
            config.num_target_layers = target_config.num_hidden_layers
        check_pair(config, target_config)
        with torch.device("meta"):
            drafter = DFlashDraftModel(config)
    except Exception as error:  # not JSON, keys missing, transformers' own checks
        raise ValueError(f"{folder}/config.json is not that of a drafter for this target: "
                         f"{one_line(error)}; give --target and --drafter of one pair") from None
    return load_weights(drafter, folder, device, getattr(torch, dtype))


def check_pair(config, target_config):
    """ValueError if a drafter's Qwen3Config does not fit a target."""
    layers = target_config.num_hidden_layers
    for key, own, wanted in (
            ("hidden_size", config.hidden_size, target_config.hidden_size),
            ("vocab_size", config.vocab_size, target_config.vocab_size),
            ("num_target_layers", config.num_target_layers, layers)):
        if own != wanted:
            raise ValueError(f"{key} is {own}, the target's {wanted}")
    # the last layer of a target cannot be read, because transformers returns it normed
    ids = config.dflash_config["target_layer_ids"]
    if not ids or ids != sorted(set(ids)) or ids[0] < 0 or ids[-1] > layers - 2:
        raise ValueError(f"target_layer_ids = {tuple(ids)} must ascend, differ, and stay within "
                         f"0 .. {layers - 2}, because the target has {layers} layers")
    mask_id = config.dflash_config["mask_token_id"]
    if not 0 <= mask_id < config.vocab_size:
        raise ValueError(f"mask_token_id = {mask_id} is not one of {config.vocab_size} ids")


def drafter_config(
        target_config, *, num_hidden_layers, target_layer_ids, mask_token_id,
        num_attention_heads, num_key_value_heads, head_dim, intermediate_size,
        block_size=16, initializer_range=0.02):
    """The Qwen3Config of a new drafter. ValueError if the target does not have these layers."""
    # the target's partial rotary factor is left out, because a drafter rotates whole heads
    pad_token_id = target_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = target_config.eos_token_id
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
    # Everything is written into a folder of a different name, which is renamed at the end. So the
    # folder appears complete or not at all, and an older one is kept until then.
    part = folder.rstrip("/") + ".part"
    tensors = {}
    for name, tensor in drafter.state_dict().items():
        tensors[name] = tensor.detach().to("cpu", torch.bfloat16).contiguous()
    config = json.dumps(public_drafter_config(drafter.config), indent=2) + "\n"
    try:
        shutil.rmtree(part, ignore_errors=True)
        os.makedirs(part)
        save_weights(tensors, os.path.join(part, "model.safetensors"))
        for name, value in (extra or {}).items():
            torch.save(value, os.path.join(part, name))
        shutil.copyfile(model.__file__, os.path.join(part, "dflash.py"))
        write_whole(os.path.join(part, "config.json"), config)
        write_whole(os.path.join(part, "README.md"), card)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint {folder!r}: {error}") from None


def public_drafter_config(c):
    """The content of config.json, from a Qwen3Config."""
    # transformers 5 would drop rope_theta from the top level, so that engines silently use 10000
    copied = (
        "num_target_layers", "num_hidden_layers", "layer_types", "hidden_size", "vocab_size",
        "intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim",
        "rms_norm_eps", "attention_bias", "initializer_range", "max_position_embeddings",
        "eos_token_id", "pad_token_id")
    config = {key: getattr(c, key) for key in copied}
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


def read_drafter_config(folder):
    """The Qwen3Config of a published drafter, whose config.json may differ from ours.

    ValueError for keys that are missing, contradict each other, or ask for what model.py does not
    compute. Such a drafter would load, and silently guess badly.
    """
    with open(os.path.join(folder, "config.json")) as f:
        raw = json.load(f)
    for key in ("dflash_config", "hidden_size", "num_hidden_layers"):
        if key not in raw:
            raise ValueError(f"it has no {key}")
    dflash = raw["dflash_config"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}

    # 1. refuse keys that would change the computation
    known = ("block_size", "mask_token_id", "target_layer_ids", "causal")
    foreign = {key: value for key, value in dflash.items() if value and key not in known}
    supported = {
        "hidden_act": "silu", "projector_type": "dflash", "rope_type": "default",
        "type": "default", "partial_rotary_factor": 1, "rope_dim": raw.get("head_dim"),
        "is_neox_style": True}
    outside = raw | rope
    for key, plain in supported.items():
        if outside.get(key) not in (None, plain):
            foreign[key] = outside[key]
    if foreign:
        raise ValueError(f"it asks for {foreign}, which model.py does not compute")

    # 2. one form for the code that follows: dflash_config has all of our own keys, and
    #    rope_parameters all keys of the rotary embedding
    raw["block_size"] = one_value("block_size", raw, dflash)
    raw["dflash_config"] = dflash | {"block_size": raw["block_size"]}
    rope_theta = one_value("rope_theta", raw, rope)
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    raw["rope_scaling"] = None
    raw.pop("rope_theta", None)
    # without its flag transformers forgets the window, and some published files lack the flag
    if "sliding_attention" in raw.get("layer_types", ()):
        raw["use_sliding_window"] = True
    config = Qwen3Config.from_dict(raw)

    # 3. engines let is_causal decide for all layers; here sliding layers are causal, full ones not
    is_causal = dflash.get("causal", raw.get("is_causal"))
    for layer_type in config.layer_types:
        if is_causal is not None and is_causal != (layer_type == "sliding_attention"):
            raise ValueError(f"is_causal = {is_causal} is not supported for {layer_type}")
    return config


def one_value(key, outer, inner):
    """The value of a key that is in one of two dicts, or in both with the same value."""
    values = {outer.get(key), inner.get(key)} - {None}
    if len(values) != 1:
        raise ValueError(f"{key} is {outer.get(key)} at the top and {inner.get(key)} inside")
    return values.pop()

# --------------------------------------------------------------------------------------------------
# weights and folders


def load_weights(module, folder, device, dtype, *, our_name=str, fp32=()):
    """Give a module on the meta device the weights of a folder. Return it frozen, in eval mode.

    our_name(name in the file) is the name in the module, or None for a tensor to skip.
    fp32: endings of the names of weights that stay in fp32.
    ValueError names every tensor that is missing, left over, of a different shape, or not finite.
    """
    path = os.path.join(folder, "model.safetensors.index.json")
    try:
        files = ["model.safetensors"]
        if os.path.isfile(path):  # it names the files of a checkpoint in several
            with open(path) as f:
                files = sorted(set(json.load(f)["weight_map"].values()))

        # find the file of each tensor, and compare names and shapes
        expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        found = {}
        for file in files:
            path = os.path.join(folder, file)
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    found[our_name(key)] = (path, key, f.get_slice(key).get_shape())
        found.pop(None, None)
        wrong = []
        for name, (_, _, shape) in found.items():
            if name not in expected:
                wrong.append(f"{name} is left over")
            elif shape != expected[name]:
                wrong.append(f"{name} is {shape}, not {expected[name]}")
        wrong += [f"{name} is missing" for name in expected if name not in found]

        # Read one tensor at a time and open its file anew for each. The pages of a mapped file
        # count as memory until it is closed, so the host needs the module and one tensor.
        weights = {}
        for name in expected if not wrong else ():
            path, key, _ = found[name]
            tensor_dtype = torch.float32 if name.endswith(tuple(fp32)) else dtype
            with safe_open(path, "pt") as f:
                weights[name] = f.get_tensor(key).to(device, tensor_dtype, copy=True)
            if not weights[name].sum().isfinite():  # one pass, no copy
                wrong.append(f"{name} is not finite")
    except Exception as error:  # a broken file has errors of a dozen types
        raise ValueError(f"cannot load {path!r}: {one_line(error)}") from None
    if wrong:
        raise ValueError(f"{folder!r} does not hold the weights that its config.json describes: "
                         f"{', '.join(wrong)}")
    module.load_state_dict(weights, assign=True)
    return module.requires_grad_(False).eval()


def checkpoint_folder(name):
    """The folder of a checkpoint: `name` itself, or the copy of a hub id, downloaded once."""
    is_hub_id = name.count("/") == 1 and name[0] not in "./~"  # owner/name, not a path
    if os.path.exists(name) or not is_hub_id:
        return name
    wanted = ("*.json", "*.safetensors", "*.jinja", "*.txt")  # no pickles
    try:
        return snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # offline, unknown, gated: a dozen types of three libraries
        raise ValueError(f"no folder {name!r}, and the hub does not give it "
                         f"({type(error).__name__}): copy it here and give its folder") from None


def newest_checkpoint(folder):
    """The folder itself if it is a checkpoint, else its last step-* folder, if it has one."""
    steps = step_folders(folder)
    if os.path.isfile(os.path.join(folder, "config.json")) or not steps:
        return folder
    return os.path.join(folder, steps[-1])


def step_folders(folder):
    """Names of the complete checkpoints of a training run, oldest first: step-000123."""
    names = glob.glob("step-*", root_dir=folder)
    return sorted(name for name in names if not name.endswith(".part"))


def save_weights(tensors, path):
    """Write a safetensors file. Its save_file() would make one that only the owner may read, and
    an engine often runs as a different user."""
    with open(path, "wb") as f:
        f.write(save(tensors, metadata={"format": "pt"}))


def write_whole(path, content):
    """Write a file of text or bytes, complete or not at all."""
    mode = "wb" if isinstance(content, bytes) else "w"
    with open(path + ".tmp", mode) as f:
        f.write(content)
    os.replace(path + ".tmp", path)


def one_line(error):
    return " ".join(str(error).split())
