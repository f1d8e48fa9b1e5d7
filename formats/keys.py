"""
The keys of a config.json: which are read, in which range, and which must have a neutral value.

A config.json can ask for a computation that we do not have. Such a model would load, and silently
be a different one. So every key is in one of four tables: numbers and flags that we read, keys that
only some values are supported of, and keys that change no result. Keys in no table are listed on
stderr. null always means the default. A key is looked for in all sections of the file.
"""
import functools
import sys

from formats.files import one_line, short

# --------------------------------------------------------------------------------------------------
# the tables

COUNT = (int, 1, 10**7)
TOKEN_ID = (int, 0, 10**7)

NUMBERS = {  # type, smallest value, largest value; for a list, of each entry
    "vocab_size": COUNT, "hidden_size": COUNT, "intermediate_size": COUNT,
    "num_hidden_layers": COUNT, "num_attention_heads": COUNT, "num_key_value_heads": COUNT,
    "head_dim": COUNT, "linear_num_key_heads": COUNT, "linear_num_value_heads": COUNT,
    "linear_key_head_dim": COUNT, "linear_value_head_dim": COUNT, "full_attention_interval": COUNT,
    "linear_conv_kernel_dim": (int, 2, 64), "max_position_embeddings": (int, 1, 10**9),
    "num_target_layers": COUNT, "block_size": (int, 2, 1024), "target_layer_ids": (int, 0, 10**7),
    "sliding_window": (int, 1, 10**9), "max_window_layers": (int, 0, 10**7),
    "mask_token_id": TOKEN_ID, "bos_token_id": TOKEN_ID, "eos_token_id": TOKEN_ID,
    "pad_token_id": TOKEN_ID,
    "rms_norm_eps": (float, 1e-12, 0.1), "rope_theta": (float, 1, 1e12),
    "partial_rotary_factor": (float, 0.001, 1), "initializer_range": (float, 0, 10),
}
LISTS = ("target_layer_ids", "layer_types")
FLAGS = ("attention_bias", "tie_word_embeddings", "is_causal", "causal", "use_sliding_window")

# keys that change what a model computes, and the values that we compute
NEUTRAL = {
    "hidden_act": ("silu",), "quantization_config": (), "mlp_bias": (False,),
    # rotary embedding: one plain kind for all layers
    "rope_type": ("default",), "type": ("default",), "factor": (1,), "attention_factor": (1,),
    "full_attention": (), "sliding_attention": (), "linear_attention": (), "chunked_attention": (),
    "rope_local_base_freq": (), "local_rope_theta": (), "swa_rope_theta": (),
    "no_rope_layers": (), "rope_interleave": (False,), "rope_interleaved": (False,),
    "is_neox_style": (True,), "rope_is_neox_style": (True,),
    # attention
    "attention_mode": ("gqa",), "attention_sink_bias": (False,), "attention_sinks": (False,),
    "attention_chunk_size": (), "sliding_window_pattern": (), "attn_logit_softcapping": (),
    "query_pre_attn_scalar": (),
    "attention_multiplier": (1,), "qk_norm": (True,), "use_qk_norm": (True,),
    # the residual stream and the output
    "input_embedding_scale": (1,), "embedding_multiplier": (1,), "scale_embeddings": (False,),
    "residual_multiplier": (1,), "output_multiplier": (1,), "logit_scale": (1,),
    "logits_scaling": (1,), "final_logit_softcapping": (),
}
# keys whose neutral value is the value of a different key
EQUAL = {"rope_dim": "head_dim", "rotary_dim": "head_dim", "draft_vocab_size": "vocab_size",
         "target_hidden_size": "hidden_size"}
DRAFTER = NEUTRAL | {
    "architectures": (["DFlashDraftModel"], ["MuseGlimmerAssistantModel"]),
    "model_type": ("qwen3", "muse_glimmer_assistant"), "speculation_type": ("dflash",),
    "projector_type": ("dflash",), "partial_rotary_factor": (1,), "text_config": (),
    "sample_from_anchor": (False,), "query_zero_predicts_next": (False,), "shift_label": (False,),
    "causal_head": (False,), "use_swa": (False,), "fc_norm": (False,),
    "norm_before_fc": (False,), "norm_before_residual": (False,),
    "eagle_aux_hidden_state_layer_ids": (), "aux_hidden_state_layer_ids": (), "layer_ids": (),
    "mask_embedding": (False,), "has_own_embed_tokens": (False,), "has_own_lm_head": (False,),
    "markov_rank": (0,), "markov_head_type": (), "enable_confidence_head": (False,),
    "conv_kernel_size": (), "conv_group_size": (), "selector_rank": (), "selector_top_k": (),
    "num_experts": (0,),
}
TARGET = NEUTRAL | {
    "architectures": (["Qwen3_5ForConditionalGeneration"], ["Qwen3_5ForCausalLM"],
                      ["Qwen3_5Model"], ["Qwen3_5TextModel"]),
    "model_type": ("qwen3_5", "qwen3_5_text"), "attention_bias": (False,), "is_causal": (True,),
    "attn_output_gate": (True,), "output_gate_type": ("swish", "silu"),  # of the linear layers
    "use_sliding_window": (False,), "mlp_only_layers": ([],),
}

# keys that change no result: of training, of loading, of serving, and of what we do not run
HARMLESS = (
    "text_config", "dflash_config", "rope_parameters", "rope_scaling", "vision_config",
    "dtype", "torch_dtype", "transformers_version", "_name_or_path", "name_or_path", "auto_map",
    "use_cache", "attention_dropout", "pretraining_tp", "original_max_position_embeddings",
    "mrope_section", "mrope_interleaved", "mamba_ssm_dtype", "mtp_num_hidden_layers",
    "mtp_use_dedicated_embeddings", "num_experts", "image_token_id", "video_token_id",
    "vision_start_token_id", "vision_end_token_id", "language_model_only", "unsloth_fixed",
    "_attn_implementation", "attn_implementation")

# --------------------------------------------------------------------------------------------------
# checks


def sections(config):
    """The dicts of a config.json in which keys can be, the outermost first."""
    found = [config]
    for name in ("text_config", "dflash_config", "rope_parameters", "rope_scaling"):
        for outer in list(found):
            inner = outer.get(name)
            if isinstance(inner, dict):
                found.append(inner)
            elif inner is not None:
                raise ValueError(f"{name} = {short(inner)} has no keys")
    return found


def check_keys(config, supported, what):
    """ValueError for the first key that has a wrong type, is out of range, or is not supported.

    supported: DRAFTER or TARGET. Keys in none of the tables are listed on stderr.
    """
    unknown = set()
    for section in sections(config):
        for key, value in section.items():
            if value is None:
                continue
            if key in supported:
                check_neutral(key, value, supported[key])
            elif key in EQUAL:
                check_neutral(key, value, [config.get(EQUAL[key])])
            elif key in LISTS or (key == "eos_token_id" and isinstance(value, list)):
                check_list(key, value)
            elif key in NUMBERS:
                check_number(key, value, NUMBERS[key])
            elif key in FLAGS:
                if not isinstance(value, bool):
                    raise ValueError(f"{key} = {short(value)}: use true or false")
            elif key not in HARMLESS:
                unknown.add(key)
    if unknown:
        names = sorted(short(key, 40) for key in unknown)
        list_unknown(what, len(names), ", ".join(names[:4]))


@functools.cache    # print each line once
def list_unknown(what, count, names):
    line = f"note: {count} keys of the {what}'s config.json are unknown and ignored: {names}"
    print(one_line(line, 199), file=sys.stderr)


def check_neutral(key, value, neutral):
    for allowed in neutral:
        # True == 1 in Python, but not in a config.json
        if value == allowed and isinstance(value, bool) == isinstance(allowed, bool):
            return
    only = " or ".join(short(allowed) for allowed in neutral[:2])
    raise ValueError(f"{key} = {short(value)} is not supported, only {only or 'null'}")


def check_list(key, value):
    if not isinstance(value, (list, tuple)) or not value:
        raise ValueError(f"{key} = {short(value)}: use a list of at least one entry")
    for entry in value:
        if key in NUMBERS:
            check_number(key, entry, NUMBERS[key])
        elif not isinstance(entry, str):
            raise ValueError(f"{key} contains {short(entry)}: use names")


def check_number(key, value, limits):
    """ValueError if a value is not a number, or outside its limits (type, smallest, largest)."""
    kind, smallest, largest = limits
    is_number = isinstance(value, (int, kind)) and not isinstance(value, bool)
    if not is_number or not smallest <= value <= largest:  # false for NaN
        name = "an integer" if kind is int else "a number"
        raise ValueError(f"{key} = {short(value)}: use {name} from {smallest:g} to {largest:g}")

# --------------------------------------------------------------------------------------------------
# one form for the code that follows


def target_keys(config):
    """The checked keys of a target's config.json in one dict. Inner sections come first."""
    keys = {}
    for section in sections(config):
        for key, value in section.items():
            if value is not None:
                keys[key] = value
    if keys.get("num_experts") or "moe" in str(keys.get("model_type")):
        raise ValueError("mixture-of-experts targets are not supported, only dense ones")
    check_keys(config, TARGET, "target")
    return keys


def drafter_keys(config):
    """The checked keys of a drafter's config.json in one dict, as Qwen3Config takes them.

    The keys of dflash_config can also be at the top level, like in the class of transformers.
    ValueError for keys that are missing or contradict each other.
    """
    check_keys(config, DRAFTER, "drafter")
    keys = {}
    for section in sections(config):
        for key, value in section.items():
            name = "is_causal" if key == "causal" else key  # the same in two engines
            is_read = name in NUMBERS or name in LISTS or name in FLAGS
            if value is None or not is_read:
                continue
            if keys.setdefault(name, value) != value:
                raise ValueError(f"{key} is {short(keys[name])} in one place and {short(value)} "
                                 "in another: give one value")
    needed = ["hidden_size", "num_hidden_layers", "block_size", "mask_token_id",
              "target_layer_ids", "rope_theta"]

    # The class of transformers has different defaults: sliding layers, which are not causal. (Its
    # windows are a token longer, but other readers of its files take the key as it is.)
    if config.get("model_type") == "muse_glimmer_assistant" or config.get("speculation_type"):
        needed += ["layer_types", "rms_norm_eps"]
        keys.setdefault("is_causal", False)
    for key in needed:
        if key not in keys:
            raise ValueError(f"it has no {key}")

    # without its flag transformers forgets the window, and some published files lack the flag
    if "layer_types" in keys:
        keys["use_sliding_window"] = "sliding_attention" in keys["layer_types"]
    if keys.get("use_sliding_window") and "sliding_window" not in keys:
        raise ValueError("it has sliding_attention layers, but no sliding_window")

    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
    keys["dflash_config"] = {
        "block_size": keys["block_size"],
        "mask_token_id": keys.pop("mask_token_id"),
        "target_layer_ids": keys.pop("target_layer_ids")}
    if "is_causal" in keys:
        keys["dflash_config"]["causal"] = keys.pop("is_causal")
    return keys
