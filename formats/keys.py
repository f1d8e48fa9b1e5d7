"""
The keys of a config.json: which are read, in which range, and which must have a neutral value.

A config.json can ask for a computation that we do not have. Such a model would load, and silently
be a different one. So each key is in one of these tables, and keys in none of them are listed on
stderr. null always means the default. A key is looked for in all sections of the file.
"""
import functools
import sys

from formats.files import LINE, one_line, short

COUNTS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "linear_num_key_heads", "linear_num_value_heads",
    "linear_key_head_dim", "linear_value_head_dim", "num_target_layers", "sliding_window",
    "max_position_embeddings")
TOKEN_IDS = ("mask_token_id", "bos_token_id", "eos_token_id", "pad_token_id")
LISTS = ("target_layer_ids", "layer_types")
FLAGS = ("attention_bias", "tie_word_embeddings", "is_causal", "causal", "use_sliding_window")
NUMBERS = {  # type, smallest value, largest value; for a list, of each entry
    **dict.fromkeys(COUNTS, (int, 1, 10**9)), **dict.fromkeys(TOKEN_IDS, (int, 0, 10**9)),
    "block_size": (int, 2, 1024), "target_layer_ids": (int, 0, 10**9),
    "linear_conv_kernel_dim": (int, 2, 64), "max_window_layers": (int, 0, 10**9),
    "rms_norm_eps": (float, 1e-12, 0.1), "rope_theta": (float, 1, 1e12),
    "partial_rotary_factor": (float, 0.001, 1), "initializer_range": (float, 0, 10)}

# Keys that change what a model computes, under the only value that we support. The first ones must
# be null: they are about rope for each type of layer, chunks, and layers of other drafters.
NULL = (
    "full_attention", "sliding_attention", "linear_attention", "chunked_attention",
    "rope_local_base_freq", "local_rope_theta", "swa_rope_theta", "no_rope_layers",
    "attention_chunk_size", "sliding_window_pattern", "attn_logit_softcapping",
    "final_logit_softcapping", "query_pre_attn_scalar", "quantization_config",
    "aux_hidden_state_layer_ids", "eagle_aux_hidden_state_layer_ids", "layer_ids",
    "conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k", "markov_rank")
FALSE = (
    "mlp_bias", "rope_interleave", "rope_interleaved", "attention_sink_bias", "attention_sinks",
    "scale_embeddings", "sample_from_anchor", "query_zero_predicts_next", "shift_label",
    "causal_head", "use_swa", "fc_norm", "norm_before_fc", "mask_embedding",
    "has_own_embed_tokens", "has_own_lm_head", "enable_confidence_head")
TRUE = ("is_neox_style", "rope_is_neox_style", "qk_norm", "use_qk_norm")
ONE = (
    "factor", "attention_factor", "input_embedding_scale", "embedding_multiplier", "logit_scale",
    "output_multiplier", "residual_multiplier", "attention_multiplier", "logits_scaling")
NEUTRAL = {
    **dict.fromkeys(FLAGS, (True, False)), **dict.fromkeys(NULL, ()),
    **dict.fromkeys(FALSE, (False,)), **dict.fromkeys(TRUE, (True,)),
    **dict.fromkeys(ONE, (1,)), "hidden_act": ("silu",), "attention_mode": ("gqa",),
    "rope_type": ("default",), "type": ("default",), "num_experts": (0,)}
DRAFTER = NEUTRAL | {
    "architectures": (["DFlashDraftModel"], ["MuseGlimmerAssistantModel"]),
    "model_type": ("qwen3", "muse_glimmer_assistant"), "speculation_type": ("dflash",),
    "projector_type": ("dflash",), "partial_rotary_factor": (1,), "text_config": ()}
TARGET = NEUTRAL | {
    "architectures": (["Qwen3_5ForConditionalGeneration"], ["Qwen3_5ForCausalLM"]),
    "model_type": ("qwen3_5", "qwen3_5_text"), "attention_bias": (False,), "is_causal": (True,),
    "attn_output_gate": (True,), "output_gate_type": ("swish", "silu"),  # of the linear layers
    "use_sliding_window": (False,), "mlp_only_layers": ([],), "full_attention_interval": (4,)}
EQUAL = {  # keys whose neutral value is the value of a different key
    "rope_dim": "head_dim", "draft_vocab_size": "vocab_size", "target_hidden_size": "hidden_size"}

HARMLESS = (  # keys that change no result
    "text_config", "dflash_config", "rope_parameters", "rope_scaling", "vision_config", "dtype",
    "torch_dtype", "transformers_version", "_name_or_path", "auto_map", "use_cache",
    "attention_dropout", "original_max_position_embeddings", "mrope_section", "mrope_interleaved",
    "mamba_ssm_dtype", "mtp_num_hidden_layers", "mtp_use_dedicated_embeddings", "image_token_id",
    "video_token_id", "vision_start_token_id", "vision_end_token_id", "language_model_only")

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
            elif key not in HARMLESS:
                unknown.add(short(key, 40))
    if unknown:
        list_unknown(f"{len(unknown)} keys of the {what}'s config.json are unknown and ignored: "
                     f"{', '.join(sorted(unknown)[:4])}")


@functools.cache    # print each line once
def list_unknown(line):
    print(one_line(f"note: {line}", LINE), file=sys.stderr)


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
        keys |= {key: value for key, value in section.items() if value is not None}
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
            name = "is_causal" if key == "causal" else key  # engines differ in this name
            if value is None or name not in (*NUMBERS, *LISTS, *FLAGS):
                continue
            if keys.setdefault(name, value) != value:
                raise ValueError(f"{key} is {short(keys[name])} in one place and {short(value)} "
                                 "in another: give one value")

    needed = ["hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "head_dim", "block_size", "mask_token_id", "target_layer_ids",
              "rope_theta"]
    # The class of transformers has different defaults: sliding layers, which are not causal. (Its
    # windows are a token longer, but other readers of its files take the key as it is.)
    if config.get("model_type") == "muse_glimmer_assistant" or config.get("speculation_type"):
        needed += ["layer_types", "rms_norm_eps"]
        keys.setdefault("is_causal", False)
    for key in needed:
        if key not in keys:
            raise ValueError(f"it has no {key}")
    heads = keys["num_attention_heads"]
    kv_heads = keys["num_key_value_heads"]
    if heads % kv_heads or keys["head_dim"] % 2:
        raise ValueError(f"num_attention_heads = {heads} must be a multiple of num_key_value_heads "
                         f"= {kv_heads}, and head_dim = {keys['head_dim']} must be even")
    kinds = keys.get("layer_types")
    if kinds:
        unknown = sorted(set(kinds) - {"full_attention", "sliding_attention"})
        if unknown or len(kinds) != keys["num_hidden_layers"]:
            raise ValueError(f"layer_types has {len(kinds)} entries for {keys['num_hidden_layers']}"
                             f" layers; unknown kinds: {short(unknown)}")
        # without use_sliding_window transformers drops the window, and some published files lack it
        keys["use_sliding_window"] = "sliding_attention" in kinds
    if keys.get("use_sliding_window") and "sliding_window" not in keys:
        raise ValueError("it has sliding_attention layers, but no sliding_window")

    keys["rope_parameters"] = {"rope_type": "default", "rope_theta": keys.pop("rope_theta")}
    dflash = {key: keys.pop(key) for key in ("mask_token_id", "target_layer_ids")}
    keys["dflash_config"] = {"block_size": keys["block_size"], **dflash}
    if "is_causal" in keys:
        keys["dflash_config"]["causal"] = keys.pop("is_causal")
    return keys
