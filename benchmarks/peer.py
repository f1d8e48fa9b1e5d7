"""
The peers: transformers' own Qwen3.5 with the very weights of a target, and its greedy generate; and
the chunked delta rule of transformers and of flash-linear-attention (the package `fla`).

Where fla can be imported, transformers runs its kernels by itself. Then it is another peer than
without. So a peer's name says which kernels its functions really are.
"""
import functools
import inspect
import sys

import torch

PACKAGES = {"fla": "flash-linear-attention", "causal_conv1d": "causal-conv1d"}


def transformers_peer(target):
    """transformers' model with the target's weights, shared where the names allow it."""
    from transformers import Qwen3_5ForCausalLM, Qwen3_5TextConfig, logging
    logging.set_verbosity_error()  # else it says on every call that it has no kernels of its own
    fields = dict(vars(target.config))
    rope = {"rope_type": "default"}
    for name in ("rope_theta", "partial_rotary_factor"):
        rope[name] = fields.pop(name)
    fields["layer_types"] = list(fields["layer_types"])
    weight = target.embed_tokens.weight
    config = Qwen3_5TextConfig(**fields, rope_parameters=rope, dtype=weight.dtype)
    with torch.device(weight.device):
        peer = Qwen3_5ForCausalLM(config).eval()
    peer.load_state_dict(peer_weights(target), assign=True)
    return peer


def peer_weights(target):
    """The target's weights under transformers' names, in which a tied head stands twice."""
    weights = {"lm_head.weight": target.head_weight}
    for name, weight in target.state_dict().items():
        if name != "lm_head.weight":
            weights["model." + name] = weight
    return weights


@torch.inference_mode()
def peer_answer(peer, prompt_ids, max_new_tokens, stops, block_size):
    """Tokens of the peer's greedy generate, ended as our own answers are: at a stop, at the limit,
    or where the target's context could not hold another block."""
    room = peer.config.max_position_embeddings - len(prompt_ids) - block_size
    prompt = torch.tensor([prompt_ids], device=peer.device)
    output = peer.generate(prompt, attention_mask=torch.ones_like(prompt), do_sample=False,
                           max_new_tokens=min(max_new_tokens, room),
                           eos_token_id=sorted(stops) or None, pad_token_id=0)
    return output[0, len(prompt_ids):].tolist()


# ------------------------------------------------------------------------------------------------
# which kernels a peer runs


def transformers_name():
    """transformers with its version and the packages whose kernels its Qwen3.5 runs."""
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
    packages = []
    for function in (qwen.torch_chunk_gated_delta_rule, qwen.torch_recurrent_gated_delta_rule,
                     qwen.causal_conv1d_fn, qwen.causal_conv1d_update):
        chosen = kernel_choice(function)["implementation"]
        package = chosen.__module__.split(".")[0]
        if package != "transformers" and package not in packages:
            packages.append(package)
    if not packages:
        return f"{name_with_version('transformers')}, its plain torch kernels"
    kernels = " and ".join(map(name_with_version, packages))
    return f"{name_with_version('transformers')} with {kernels}"


def kernel_choice(function):
    """Between which kernels a function of transformers' model file chose.

    The choice is made when that file is imported. It is kept in the function's closure, which is
    returned: "torch_function" is the one that stands in the file, "implementation" the one that is
    run, which is the same or that of another package. Source: transformers 5.17 and 5.24,
    use_kernel_func_from_hub_with_fallback in integrations/hub_kernels.py.
    """
    if isinstance(function, torch.nn.Module):  # where the package `kernels` wraps it once more
        function = inspect.getclosurevars(function.forward).nonlocals["func"]
    choice = inspect.getclosurevars(function).nonlocals
    if "implementation" not in choice:
        raise ValueError(f"{name_with_version('transformers')} does not tell which kernels its "
                         "Qwen3.5 runs: install 5.17 to 5.24")
    return choice


def name_with_version(package):
    """The name by which an imported package is installed, and its version."""
    version = sys.modules[package].__version__
    return f"{PACKAGES.get(package, package)} {version}"


def delta_rule_peers(device):
    """{name: chunked gated delta rule}: of transformers, and on CUDA that of fla, if it is there.

    Each takes (q, k, v, g, beta) in the shapes of target.gated_delta_rule, with q and k of unit
    length, and scales by D^-0.5, as that does. Each returns the outputs (B, T, Hv, Dv) and the last
    state, which the reading of a prompt needs.
    """
    from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen
    plain = kernel_choice(qwen.torch_chunk_gated_delta_rule)["torch_function"]
    peers = {f"{name_with_version('transformers')}, its plain torch kernel": plain}
    if device.startswith("cuda"):
        try:
            from fla.ops.gated_delta_rule import chunk_gated_delta_rule
            peers[name_with_version("fla")] = chunk_gated_delta_rule
        except Exception as error:  # not installed, or not for this Triton or GPU
            print(f"without flash-linear-attention, which cannot be imported: {error}\n")
    return {name: functools.partial(kernel, output_final_state=True)
            for name, kernel in peers.items()}
