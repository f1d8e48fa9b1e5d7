"""
Folders in and out: the target's and the drafter's weights, and the rules of their config.json.

    target = load_target("Qwen/Qwen3.5-0.8B")      # a hub id, a folder of that form, random:0.8b
    drafter = load_drafter("data/nano/drafter-dflash", target.config)
    save_drafter(drafter, "out/my-dflash", card="# My drafter")

Every error that a user can cause is a ValueError of one line: which file, what is wrong, what to
do about it.
"""
import json
import os
import shutil
from dataclasses import fields, replace

import torch
import torch.nn as nn
from huggingface_hub import snapshot_download
from safetensors import safe_open
from safetensors.torch import save_file
from transformers.models.qwen3.configuration_qwen3 import Qwen3Config

import model
from fast.cpu import pack_linears, pack_target
from model import DFlashDraftModel
from fast.projections import join_projections
from target import Target, TargetConfig

# --------------------------------------------------------------------------------------------------
# the target


def load_target(name, device="cpu", dtype="float32"):
    """A Target, frozen and in eval mode.

    name: a folder with config.json and safetensors in the public layout; a hub id; or, with random
    weights, random:SIZE for a published size and random:SIZE:LAYERS for its first layers.
    Raises ValueError, naming the file and what is wrong, when there is no such target.
    """
    dtype = parse_dtype(device, dtype)
    # A bf16 model multiplies in fp32 within the delta rule only. What goes into that was rounded to
    # the 8 bits of bf16. So its factors may be rounded to the 11 bits of TF32, which is faster on a
    # GPU and changes features by less than bf16 does (benchmarks/results/readme.md).
    torch.backends.cuda.matmul.allow_tf32 = dtype == torch.bfloat16
    config, folder = read_target_config(name)
    if folder is None:  # random weights
        return pack_target(join_projections(random_target(config, device, dtype)))
    # a model without memory, into which the tensors of the file are put as they are
    with torch.device("meta"):
        target = Target(config)

    def our_name(file_name):
        """Our name of a tensor in a public file; None for what is not of the text model."""
        our = file_name.removeprefix("model.").removeprefix("language_model.")
        if our.startswith(("visual.", "mtp.")):  # the vision tower, multi-token prediction
            return None
        if our == "lm_head.weight" and config.tie_word_embeddings:
            return None  # a tied head is the embedding, even where a file repeats it
        return our

    load_weights(target, folder, device, dtype, our_name, FP32_WEIGHTS)
    return pack_target(join_projections(target))


# stored and used in fp32 whatever the model's dtype is
FP32_WEIGHTS = ("linear_attn.A_log", "linear_attn.norm.weight")


def read_target_config(name):
    """(TargetConfig, folder) of a folder or hub id.

    Of random:SIZE[:LAYERS] the folder is None. ValueError when there is no such target.
    """
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
    """TargetConfig of a parsed config.json, nested (under text_config) or flat.

    ValueError names the keys that are missing, or what the file asks for that is not computed here.
    """
    # one flat dict: a multimodal file has the text model's keys inside, and all have rope's inside
    keys = dict(config)
    keys |= config.get("text_config") or {}
    keys |= keys.get("rope_parameters") or keys.get("rope_scaling") or {}
    if keys.get("num_experts") or "moe" in str(keys.get("model_type")):
        raise ValueError("this config.json describes a mixture-of-experts target; only dense ones "
                         "are supported")
    # keys that would change the computation must have the value that is computed here
    supported = {"rope_type": "default", "hidden_act": "silu", "quantization_config": None}
    for key, value in supported.items():
        if keys.get(key, value) != value:
            raise ValueError(f"{key} = {keys[key]!r} is not supported, only {value!r}")
    if "layer_types" in keys:
        keys["layer_types"] = tuple(keys["layer_types"])
    # all other keys that TargetConfig does not know say nothing about the computation
    known = {field.name for field in fields(TargetConfig)}
    try:
        return TargetConfig(**{key: value for key, value in keys.items() if key in known})
    except TypeError as error:
        raise ValueError(f"config.json is not that of a Qwen3.5 text model: {error}") from None


def parse_dtype(device, dtype):
    """The torch dtype of a name. ValueError if we do not run in it, or the device is not here."""
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise ValueError(f"device = {device!r}, but torch sees no GPU here: use --device=cpu")
    if dtype not in ("float32", "bfloat16"):
        raise ValueError(f"dtype = {dtype!r}: use float32 or bfloat16 "
                         "(fp16 overflows in the decay's gate)")
    return getattr(torch, dtype)


def published_size(hidden_size, intermediate_size, layers, heads, kv_heads, value_heads, tied):
    """The TargetConfig of a published size; what all sizes share stands here."""
    return TargetConfig(
        vocab_size=248320, hidden_size=hidden_size, intermediate_size=intermediate_size,
        num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=kv_heads,
        head_dim=256, linear_num_key_heads=16, linear_num_value_heads=value_heads,
        linear_key_head_dim=128, linear_value_head_dim=128, tie_word_embeddings=tied,
        eos_token_id=248044, pad_token_id=248044)


SIZES = {
    "0.8b": published_size(1024, 3584, 24, 8, 2, 16, tied=True),
    "2b": published_size(2048, 6144, 24, 8, 2, 16, tied=True),
    "4b": published_size(2560, 9216, 32, 16, 4, 32, tied=True),
    "9b": published_size(4096, 12288, 32, 16, 4, 32, tied=False),
    "27b": published_size(5120, 17408, 64, 24, 4, 48, tied=False),  # Qwen3.6-27B has this shape too
}


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
    """A Target with random weights, always the same, made in place in their dtype.

    The layers outweigh the embedding: else a tied head would repeat the last token for ever.
    """
    with torch.device("meta"):
        target = Target(config)
    generator = torch.Generator(device).manual_seed(0)
    weights = {}
    for name, parameter in target.named_parameters():
        weight_dtype = torch.float32 if name.endswith(FP32_WEIGHTS) else dtype
        weight = torch.empty(parameter.shape, device=device, dtype=weight_dtype)
        if name == "embed_tokens.weight":
            weight.normal_(std=0.02, generator=generator)
        elif weight.dim() > 1:
            fan_in = weight[0].numel()
            weight.normal_(std=fan_in ** -0.5, generator=generator)
        elif name.endswith("A_log"):
            weight.uniform_(0.01, 16, generator=generator).log_()
        elif name.endswith(("dt_bias", "linear_attn.norm.weight")):
            weight.fill_(1.0)
        else:
            weight.fill_(0.0)
        weights[name] = weight
    target.load_state_dict(weights, assign=True)
    return target.requires_grad_(False).eval()

# --------------------------------------------------------------------------------------------------
# the drafter


def load_drafter(name, target_config, device="cpu", dtype="float32"):
    """A frozen drafter from a checkpoint folder or a hub id, for the target of that TargetConfig.

    A folder of a training run stands for its newest checkpoint. Raises ValueError, with the two
    numbers that differ, when there is no drafter or it belongs to another target.
    """
    # find the folder
    folder = newest_checkpoint(checkpoint_folder(name))
    if not os.path.isfile(os.path.join(folder, "config.json")):
        raise ValueError(f"no drafter in {folder!r}: give a folder with config.json, or train one: "
                         "python train.py config/nano.py")
    # make the drafter that its config.json describes, and see whether it belongs to the target
    try:
        config = read_drafter_config(folder)
        if getattr(config, "num_target_layers", None) is None:  # some published files lack it
            config.num_target_layers = target_config.num_hidden_layers
        with torch.device("meta"):
            drafter = DFlashDraftModel(config)
    except Exception as error:  # not JSON, keys missing, and what transformers' own checks raise
        raise ValueError(f"{folder}/config.json is not a DFlash drafter's: {one_line(error)}; "
                         "give the folder or hub id of one") from None
    check_pair(folder, drafter, target_config)
    # then its weights
    load_weights(drafter, folder, device, getattr(torch, dtype))
    return prepare_decoding(drafter)


def prepare_decoding(drafter):
    """Bring the weights of a frozen drafter into the form that decodes fastest; returns it.

    On a GPU several projections become one product. On a CPU that would gain 1 %, and lose the
    large weights' packing.
    """
    if drafter.fc.weight.is_cuda:
        return join_projections(drafter)
    return pack_linears(drafter)


def check_pair(folder, drafter, target_config):
    """ValueError if a drafter reads other features or another vocabulary than a target has."""
    config = drafter.config
    for key, own, wanted in (
            ("hidden_size", config.hidden_size, target_config.hidden_size),
            ("vocab_size", config.vocab_size, target_config.vocab_size),
            ("num_target_layers", config.num_target_layers, target_config.num_hidden_layers)):
        if own != wanted:
            raise ValueError(f"the drafter in {folder!r} does not fit this target: {key} is {own}, "
                             f"the target's {wanted}; give --target and --drafter of one pair")
    last_layer = max(drafter.target_layer_ids)
    mask_id = drafter.mask_token_id
    if last_layer > target_config.num_hidden_layers - 2 or mask_id >= target_config.vocab_size:
        raise ValueError(f"the drafter in {folder!r} does not fit this target: it reads layer "
                         f"{last_layer} of {target_config.num_hidden_layers} (the last one cannot "
                         f"be read), mask id {mask_id} of {target_config.vocab_size} ids")


def drafter_config(
        target_config,
        layers,
        target_layer_ids,
        mask_token_id,
        heads,
        kv_heads,
        head_dim,
        mlp,
        block_size=16,
        initializer_range=0.02):
    """The Qwen3Config of a new drafter; ValueError if the target has no such layers.

    Its rope_theta is the target's. The target's partial rotary factor is not: the drafter rotates
    whole heads. The last layer of a target cannot be tapped: transformers returns it normed.
    """
    layer_ids = list(target_layer_ids)
    last = target_config.num_hidden_layers - 2
    ascends = layer_ids == sorted(set(layer_ids))
    if not layer_ids or not ascends or layer_ids[0] < 0 or layer_ids[-1] > last:
        raise ValueError(f"target_layer_ids = {tuple(layer_ids)} must ascend, differ and stay "
                         f"within 0 .. {last}, as the target has "
                         f"{target_config.num_hidden_layers} layers")
    pad_token_id = target_config.pad_token_id
    if pad_token_id is None:
        pad_token_id = target_config.eos_token_id
    return Qwen3Config(
        block_size=block_size,
        dflash_config={"block_size": block_size, "mask_token_id": mask_token_id,
                       "target_layer_ids": layer_ids},
        num_target_layers=target_config.num_hidden_layers,
        num_hidden_layers=layers,
        layer_types=["full_attention"] * layers,
        hidden_size=target_config.hidden_size,
        intermediate_size=mlp,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        initializer_range=initializer_range,
        rope_parameters={"rope_type": "default", "rope_theta": target_config.rope_theta},
        rms_norm_eps=target_config.rms_norm_eps,
        vocab_size=target_config.vocab_size,
        max_position_embeddings=target_config.max_position_embeddings,
        tie_word_embeddings=False,
        eos_token_id=target_config.eos_token_id,
        pad_token_id=pad_token_id)


def save_drafter(drafter, folder, card, extra=None):
    """Write a checkpoint as engines read it.

    config.json, model.safetensors (bf16), dflash.py (model.py itself) and README.md (the card).
    extra: {file name: object} for torch.save beside them. The folder appears whole, under its name,
    or not at all. ValueError when it cannot be written.
    """
    # All is written into a folder of another name, which is renamed at the end. An older folder of
    # the final name is deleted only then.
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
        for name, text in (("config.json", config), ("README.md", card)):
            with open(os.path.join(part, name), "w") as f:
                f.write(text)
        shutil.rmtree(folder, ignore_errors=True)
        os.replace(part, folder)
    except OSError as error:
        raise ValueError(f"cannot write the checkpoint {folder!r}: {error}") from None


def public_drafter_config(c):
    """What stands in config.json, from a Qwen3Config.

    Written by hand: transformers 5 drops rope_theta from the top level when it saves, and readers
    of that key would fall back to 10000 without a word.
    """
    rope_theta = c.rope_parameters["rope_theta"]
    layer_types = list(c.layer_types)
    is_sliding = "sliding_attention" in layer_types
    return {
        "architectures": ["DFlashDraftModel"],
        "model_type": "qwen3",
        "auto_map": {"AutoModel": "dflash.DFlashDraftModel"},
        # in both places, as some readers look here and some there
        "block_size": c.dflash_config["block_size"],
        "dflash_config": dict(c.dflash_config),
        "num_target_layers": c.num_target_layers,
        "num_hidden_layers": c.num_hidden_layers,
        "layer_types": layer_types,
        "hidden_size": c.hidden_size,
        "intermediate_size": c.intermediate_size,
        "num_attention_heads": c.num_attention_heads,
        "num_key_value_heads": c.num_key_value_heads,
        "head_dim": c.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": c.rms_norm_eps,
        "attention_bias": c.attention_bias,
        "attention_dropout": 0.0,
        "initializer_range": c.initializer_range,
        "max_position_embeddings": c.max_position_embeddings,
        "vocab_size": c.vocab_size,
        "tie_word_embeddings": False,
        "use_cache": True,
        # in both places too
        "rope_theta": rope_theta,
        "rope_scaling": None,
        "rope_parameters": {"rope_type": "default", "rope_theta": rope_theta},
        "use_sliding_window": is_sliding,
        "sliding_window": c.sliding_window if is_sliding else None,
        "max_window_layers": c.num_hidden_layers,
        "bos_token_id": None,
        "eos_token_id": c.eos_token_id,
        "pad_token_id": c.pad_token_id,
        "dtype": "bfloat16",
        "torch_dtype": "bfloat16",
    }


def read_drafter_config(folder):
    """The Qwen3Config of a published drafter, whose config.json may differ from ours.

    ValueError for keys that are missing, that contradict each other, or that ask for what model.py
    does not compute: such a drafter would load, and guess badly without a word.
    """
    with open(os.path.join(folder, "config.json")) as f:
        raw = json.load(f)
    for key in ("dflash_config", "hidden_size", "num_hidden_layers"):
        if key not in raw:
            raise ValueError(f"it has no {key}")
    dflash = raw["dflash_config"]
    rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}

    # 1. block_size and rope_theta stand at the top, inside, or in both places
    block_size = one_value("block_size", raw, dflash)
    rope_theta = one_value("rope_theta", raw, rope)

    # 2. nothing that would change the computation
    foreign = {}
    known = ("block_size", "mask_token_id", "target_layer_ids")
    for key, value in dflash.items():
        if value and key not in known:
            foreign[key] = value
    supported = {"partial_rotary_factor": 1, "rope_type": "default", "hidden_act": "silu"}
    for key, plain in supported.items():
        value = rope.get(key, raw.get(key, plain))
        if value != plain:
            foreign[key] = value
    if foreign:
        raise ValueError(f"it asks for {foreign}, which model.py does not compute")

    # 3. layer ids and mask id make sense
    layer_ids = dflash["target_layer_ids"]
    mask_id = dflash["mask_token_id"]
    if layer_ids != sorted(set(layer_ids)) or not layer_ids or layer_ids[0] < 0 or mask_id < 0:
        raise ValueError(f"target_layer_ids = {layer_ids} must ascend and mask_token_id = "
                         f"{mask_id} not be negative")

    # 4. without its flag transformers forgets the window, and some published files lack the flag
    uses_window = raw.get("use_sliding_window") or "sliding_attention" in raw.get("layer_types", ())

    # 5. one form for the code that follows
    #    (dflash_config has all that is ours, rope_parameters all of the rotary embedding)
    raw["block_size"] = block_size
    raw["dflash_config"] = dflash | {"block_size": block_size}
    raw["use_sliding_window"] = uses_window
    raw["rope_parameters"] = {"rope_type": "default", "rope_theta": rope_theta}
    raw["rope_scaling"] = None
    raw.pop("rope_theta", None)
    return Qwen3Config.from_dict(raw)


def one_value(key, outer, inner):
    """The value of a key that stands in one of two dicts, or in both with the same value."""
    values = {place[key] for place in (outer, inner) if place.get(key) is not None}
    if len(values) == 0:
        raise ValueError(f"it has no {key}")
    if len(values) == 2:
        raise ValueError(f"{key} is {outer[key]} at the top and {inner[key]} inside")
    return values.pop()

# --------------------------------------------------------------------------------------------------
# weights and folders


def load_weights(module: nn.Module, folder, device, dtype, our_name=lambda name: name, fp32=()):
    """Give a module that was made on the meta device the weights of a folder, whole or in shards.

    our_name: from a file's name of a tensor to the module's; None skips the tensor.
    fp32: endings of names whose weights stay in fp32.

    ValueError names every tensor that is missing, left over, of another shape or not finite, or the
    file that cannot be read.
    """
    files = weight_files(folder)
    path = files[0]
    try:
        # which file holds which tensor, and is it the one that the module wants?
        expected = {name: list(tensor.shape) for name, tensor in module.state_dict().items()}
        places = {}
        wrong = []
        for path in files:
            with safe_open(path, "pt") as f:
                for key in f.keys():
                    name = our_name(key)
                    if name is None:
                        continue
                    shape = f.get_slice(key).get_shape()
                    if name not in expected:
                        wrong.append(f"{name} is left over")
                    elif shape != expected[name]:
                        wrong.append(f"{name} is {shape}, not {expected[name]}")
                    places[name] = (path, key)
        for name in expected:
            if name not in places:
                wrong.append(f"{name} is missing")

        # One tensor at a time, from a file opened anew for each: pages of a mapped file count as
        # memory until it is closed. So the host needs the module and one tensor.
        weights = {}
        for name in expected if not wrong else ():
            path, key = places[name]
            tensor_dtype = torch.float32 if name.endswith(tuple(fp32)) else dtype
            with safe_open(path, "pt") as f:
                weights[name] = f.get_tensor(key).to(device, tensor_dtype, copy=True)
            # one pass without a copy; a sum that overflows is no weight either
            if not weights[name].sum().isfinite():
                wrong.append(f"{name} is not finite")
    except Exception as error:  # safetensors' own for a broken file, OSError, no memory left
        raise ValueError(f"cannot load {path!r}: {one_line(error)}") from None
    if wrong:
        raise ValueError(f"{folder!r} does not hold the weights that its config.json describes: "
                         f"{', '.join(wrong)}")
    module.load_state_dict(weights, assign=True)
    module.requires_grad_(False).eval()


def weight_files(folder):
    """The safetensors files of a folder: one, or the shards that its index names."""
    index = os.path.join(folder, "model.safetensors.index.json")
    if not os.path.isfile(index):
        return [os.path.join(folder, "model.safetensors")]
    try:
        with open(index) as f:
            names = set(json.load(f)["weight_map"].values())
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(f"cannot load {index!r}: {one_line(error)}") from None
    return [os.path.join(folder, name) for name in sorted(names)]


def checkpoint_folder(name):
    """The folder of a checkpoint: `name` itself, or the local copy of a hub id.

    A hub id such as Qwen/Qwen3.5-0.8B is downloaded once. ValueError when the hub does not give it.
    """
    # owner/name, and no path
    is_hub_id = name.count("/") == 1 and name[0] not in "./~"
    if os.path.exists(name) or not is_hub_id:
        return name
    # no pickles: safetensors, and the text files of tokenizer and template
    wanted = ("*.json", "*.safetensors", "*.jinja", "*.txt")
    try:
        return snapshot_download(name, allow_patterns=wanted)
    except Exception as error:  # offline, unknown, gated: a dozen types of three libraries
        raise ValueError(f"no folder {name!r}, and the hub does not give it "
                         f"({type(error).__name__}): copy the checkpoint here and give its folder"
                         ) from None


def newest_checkpoint(folder):
    """The folder itself if it is a checkpoint, else its last step-* folder, if it has one."""
    steps = step_folders(folder)
    if os.path.isfile(os.path.join(folder, "config.json")) or not steps:
        return folder
    return os.path.join(folder, steps[-1])


def step_folders(folder):
    """Names of the whole checkpoints of a training run, oldest first: step-000123."""
    if not os.path.isdir(folder):
        return []
    names = [name for name in os.listdir(folder) if name.startswith("step-")]
    return sorted(name for name in names if not name.endswith(".part"))


def save_weights(tensors, path):
    """Write a safetensors file that others may read as far as the umask lets them.

    safetensors makes files for the owner alone, and an engine often runs as another user.
    """
    save_file(tensors, path, metadata={"format": "pt"})
    umask = os.umask(0)  # it can only be read by setting it
    os.umask(umask)
    os.chmod(path, 0o666 & ~umask)


def write_whole(path, text):
    """Write a text file, whole or not at all."""
    with open(path + ".tmp", "w") as f:
        f.write(text)
    os.replace(path + ".tmp", path)


def one_line(error):
    return " ".join(str(error).split())
