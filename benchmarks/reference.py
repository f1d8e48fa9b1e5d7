"""
The references: transformers' Qwen3.5 with the weights of a target, and its greedy generate; and the
chunked delta rule of transformers and of flash-linear-attention (the package `fla`).
"""
import functools
import importlib
import inspect

import torch
import transformers

from formats.files import one_line

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


@torch.inference_mode()
def reference_answer(reference, prompt_ids, max_new_tokens, stops, block_size):
    """Tokens of the reference's greedy generate. They end like our own answers: at a stop, at the
    limit, or when the target's context has no room for another block."""
    room = reference.config.max_position_embeddings - len(prompt_ids) - block_size
    prompt = torch.tensor([prompt_ids], device=reference.device)
    output = reference.generate(
        prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
        max_new_tokens=min(max_new_tokens, room), eos_token_id=sorted(stops) or None,
        pad_token_id=0)
    return output[0, len(prompt_ids):].tolist()


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


def delta_rule_references(device):
    """{name: chunked gated delta rule}: of transformers, and on CUDA of fla, if it is installed.

    Each takes (q, k, v, g, beta) in the shapes of gated_delta_rule, with q and k of unit length,
    and scales by D^-0.5. Each returns the outputs (B, T, Hv, Dv) and the last state.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5
    # its decorator may replace this function by the one of fla
    plain = inspect.unwrap(modeling_qwen3_5.torch_chunk_gated_delta_rule)
    kernels = {f"transformers {transformers.__version__}, plain": plain}
    if device.startswith("cuda"):
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            version = importlib.import_module("fla").__version__
            kernels[f"fla {version}"] = chunk_gated_delta_rule
        except Exception as error:  # not installed, or not for this Triton or GPU
            print(f"without flash-linear-attention, which cannot be imported: "
                  f"{one_line(error)}\n")
    return {name: functools.partial(kernel, output_final_state=True)
            for name, kernel in kernels.items()}
