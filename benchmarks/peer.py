"""
The peer: transformers' own Qwen3.5 with the very weights of a target, and its greedy generate.
"""
import torch


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
