"""
The reference: transformers' Qwen3.5 with the weights of a target.
"""
import importlib

import torch
import transformers


def transformers_reference(target):
    """transformers' model with the target's weights, which it shares if the names allow it."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig  # here: the import takes seconds
    transformers.logging.set_verbosity_error()  # or it says on every call that it has no kernels
    fields = dict(vars(target.config))
    rope = {"rope_type": "default"}
    for name in ("rope_theta", "partial_rotary_factor"):
        rope[name] = fields.pop(name)
    fields["layer_types"] = list(fields["layer_types"])
    weight = target.embed_tokens.weight
    config = Qwen3_5TextConfig(**fields, rope_parameters=rope, dtype=weight.dtype)
    with torch.device(weight.device):
        reference = Qwen3_5ForCausalLM(config).eval()

    # under transformers' names, a tied head has its own entry
    weights = {"lm_head.weight": target.head_weight}
    for name, weight in target.state_dict().items():
        if name != "lm_head.weight":
            weights["model." + name] = weight
    reference.load_state_dict(weights, assign=True)
    return reference


def transformers_name():
    """transformers and its version, with the packages whose kernels it runs. It runs those of fla
    and causal_conv1d whenever they can be imported."""
    name = f"transformers {transformers.__version__}"
    for package in ("fla", "causal_conv1d"):
        try:
            version = importlib.import_module(package).__version__
        except Exception:  # not installed, or not for this Triton or GPU
            continue
        name += f" with {package} {version}"
    return name
