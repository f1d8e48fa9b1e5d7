"""
Decoding bugs, injected on purpose. Each one puts one wrong line into the real code, as somebody
would write it: a name, the test that catches it, a function, its right text, and the wrong one. The
comment says what the bug is and why people write it. docs/bugs.md has the cost of each.
"""
from benchmarks.inject_bug import Bug
from checkpoint import load_weights
from decode_state import DecodeState, LinearLayerState, prefill
from delta_rule import delta_rule_of_window
from draft_decode import Decoder, count_accepted
from model import Attention, DFlashDraftModel
from model import RMSNorm as DrafterRMSNorm
from target import RMSNorm as TargetRMSNorm
from target import Target
from tokenizer import chat_text

# the tests that catch several of them
TRAINED_FORM = "test_drafter_decodes_as_it_was_trained"
WHOLE_ROUNDS = "test_training_form_predicts_decoded_rounds"
TRANSFORMERS = "test_target_equals_transformers"
CHAT = "test_chat_prompt_has_the_empty_thought"
ROTARY = "test_failure_3_partial_rotary_stays_with_the_target"
LOOP = "test_generate_ends_at_the_limit"
STATE = "test_cuts_rejected_block"

INPUTS = (
    # The feature of token t is at position t + 1, as in methods that pair it with the next token.
    Bug("features_one_late", TRAINED_FORM, DFlashDraftModel.write_context,
        "position[:, None] + offsets",
        "position[:, None] + 1 + offsets"),

    # Id i is read as transformers' hidden_states[i], which is the input of layer i. Seen in
    # onnxruntime-genai #2460, where acceptance stayed at exactly 1.000.
    Bug("feature_layers_one_early", TRANSFORMERS, Target.forward,
        "if i in target_layer_ids:",
        "if i + 1 in target_layer_ids:"),

    # Ids are counted from 1, so each feature is the output of the next layer.
    Bug("feature_layers_one_late", TRANSFORMERS, Target.forward,
        "if i in target_layer_ids:",
        "if i - 1 in target_layer_ids:"),

    # The features are concatenated in a different order, because an engine collects them in a dict.
    Bug("feature_layers_reversed", TRANSFORMERS, Target.forward,
        "torch.cat(features, -1)",
        "torch.cat(features[::-1], -1)"),

    # Features are normed, because the last of transformers' hidden_states is.
    Bug("feature_layers_after_the_norm", TRANSFORMERS, Target.forward,
        "features.append(x)",
        "features.append(self.norm(x))"),

    # Each layer norms the context, as other models do. But hidden_norm has already normed it.
    Bug("context_through_layer_norm", TRAINED_FORM, DFlashDraftModel.write_context,
        "keys_values(context, rotary)",
        "keys_values(layer.input_layernorm(context), rotary)"),

    # The features of the answer are never written, so the drafter sees only the prompt.
    Bug("context_of_the_prompt_only", WHOLE_ROUNDS, Decoder.commit,
        "self.drafter.write_context(features, self.cache, self.state.position)",
        "pass"),

    # The features are written after the commit has moved the position, so they are at wrong places.
    Bug("context_after_commit", WHOLE_ROUNDS, Decoder.commit,
        "features, self.cache, self.state.position)",
        "features, self.cache, self.state.position + accepted + 1)"),

    # The mask is the tokenizer's last id instead of the first free one, so it is a real token.
    Bug("mask_id_one_low", "test_block_is_the_anchor_and_masks", DFlashDraftModel.embed_block,
        "self.mask_token_id",
        "self.mask_token_id - 1"),

    # The drafter was trained without thinking, but the engine thinks by default, so the prompt ends
    # with an open thought. Seen in z-lab/dflash #133: 25 % accepted instead of 60 %.
    Bug("thinking_left_on", CHAT, chat_text,
        "enable_thinking=thinking",
        "enable_thinking=True"),

    # The engine's chat template has no thinking, so the prompt lacks the rows' empty thought.
    Bug("empty_thought_left_out", CHAT, chat_text,
        "enable_thinking=thinking",
        r'chat_template=tokenizer.chat_template.replace(r"<think>\n\n</think>\n\n", "")'),
)

COMPUTATION = (
    # The drafter rotates a quarter of each head, because partial_rotary_factor was copied with the
    # rest of the target's config.json. Seen as tau 1.2. With a rope factor on one side only: 13 %
    # instead of 60 % (z-lab/dflash #66, #126).
    Bug("partial_rotary", ROTARY, DFlashDraftModel.rotary,
        "self.config.head_dim",
        "self.config.head_dim // 4"),

    # A loader looks for rope_theta at the top level, where transformers 5 does not write it, and
    # uses the old default of 10,000.
    Bug("rope_theta_lost", ROTARY, DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        "10000.0"),

    # The drafter has the theta of a different model, a thousand times too large.
    Bug("rope_theta_of_another", ROTARY, DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        '1000 * self.config.rope_parameters["rope_theta"]'),

    # The mask inside the block is causal, which is the default of every engine's attention kernel.
    # So a position does not see the masks after it. Seen as 98 % in training, 10 % served.
    Bug("causal_block", TRAINED_FORM, Attention.decode,
        "key_position <= last_position.expand_as(query_position)",
        "key_position <= query_position"),

    # The block is rotated as if it began after the anchor instead of at the anchor.
    Bug("block_one_late", TRAINED_FORM, DFlashDraftModel.decode_block,
        "self.rotary(positions)",
        "self.rotary(positions + 1)"),

    # The drafter's norms are read like the target's: (1 + w) x instead of w x.
    Bug("gain_read_as_1_plus_w", "test_drafter_equals_basic", DrafterRMSNorm.forward,
        "to_fp32(self.weight)",
        "1 + to_fp32(self.weight)"),

    # The head gets the drafter's output without its last norm, as engines return hidden states.
    Bug("last_norm_left_out", TRAINED_FORM, DFlashDraftModel.decode_block,
        "return self.norm(x)",
        "return x"),

    # Guesses are sampled with the drafter's own noise, so a guess is right only as often as two
    # independent samples agree. Seen in z-lab/dflash #169: 1.16 tokens per round instead of 2.96.
    Bug("noise_of_its_own", "test_guesses_are_greedy_where_the_target_is", Decoder.draft,
        "logits.argmax(-1)",
        "torch.distributions.Categorical(logits=logits).sample()",
        temperature=1.0),
)

VERIFICATION = (
    # Correct guesses count even if they follow a wrong one, so tau looks better.
    Bug("right_after_a_wrong_one", "test_accept_counts_up_to_the_first_difference", count_accepted,
        "right.long().cumprod(-1)",
        "right.long()"),

    # The target's own token comes from the last position, as if all guesses had been accepted.
    Bug("bonus_from_the_last_row", LOOP, Decoder.accept,
        "self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])",
        "self.anchor.copy_(choices[:, -1]); "
        "choices.scatter_(1, accepted[:, None], self.anchor[:, None])"),

    # The accepted guesses are committed, but the anchor is not counted.
    Bug("commit_one_short", LOOP, Decoder.commit,
        "(accepted + 1) * self.is_active",
        "accepted * self.is_active"),

    # Verification attends to the whole block, so the target sees the guesses that it has to judge.
    Bug("verification_not_causal", STATE, DecodeState.begin_forward,
        "self.token_positions[..., None]",
        "self.token_positions[:, -1:, None]"),

    # As in most projects there is one matrix S, and nobody restores it after a rejection. Keys and
    # values are cropped, but S keeps what rejected guesses wrote. Seen in z-lab/dflash #172 and
    # transformers #49036, where 12 to 41 of 384 choices changed, with margins of 0.6 to 2.4.
    # (The prompt must be prefilled as one segment here, because no token may pad a block.)
    Bug("rejected_state_kept", STATE, LinearLayerState.delta_rule,
        "state = self.state\n",
        "state = self.state\n"
        "    if state.forward_is_block:\n"
        "        S = self.S[state.S_place, state.sequences]\n"
        "        o, S = gated_delta_rule(q, k, v, g, beta, S=S)\n"
        "        self.S[:] = S\n"
        "        return o\n",
        also=(
            prefill,
            "K = state.tokens_per_forward\n",
            "state.reset()\n"
            "    tokens = torch.as_tensor(prompts, device=state.position.device)\n"
            "    n = torch.full_like(state.position, tokens.shape[1])\n"
            "    features, hidden = target(\n"
            "        tokens, state, target_layer_ids, segment=Segment(0, n))\n"
            "    state.commit(n)\n"
            "    return features, target.logits(hidden[:, -1:])[:, 0]\n")),

    # The short convolution keeps the last three tokens of the block, accepted or not, and the next
    # three tokens see them. People who crop a cache forget this even after they remember S.
    Bug("conv_memory_kept", LOOP, Decoder.commit,
        "self.state.commit((accepted + 1) * self.is_active)",
        "sequences = self.state.sequences[:, None]\n"
        "    last = self.state.position[:, None] + self.offsets[-3:]\n"
        "    new = self.state.position[:, None] + accepted[:, None] - 2 + self.offsets[:3]\n"
        "    conv, ring = self.state.conv, self.state.conv_length\n"
        "    conv[:, sequences, new % ring] = conv[:, sequences, last % ring]\n"
        "    self.state.commit((accepted + 1) * self.is_active)"),

    # S after the whole window is taken for the state after its first chunk. Such a delta rule is
    # right for one token at a time and wrong after a block.
    Bug("state_of_the_second_chunk", STATE, delta_rule_of_window,
        "if i == 0:",
        "if i <= 1:"),

    # The target's norms are read as plain ones: w x instead of (1 + w) x.
    Bug("target_gain_read_as_w", TRANSFORMERS, TargetRMSNorm.forward,
        "1 + to_fp32(self.weight)",
        "to_fp32(self.weight)"),

    # Not a bug: bfloat16 instead of float32 shows what rounding does to the same figures.
    Bug("served_in_bf16", None, load_weights,
        "else dtype",
        "else torch.bfloat16"),

    # Weights and activations are in fp16, whose largest number is 65,504. In an engine, large
    # activations overflowed, and acceptance collapsed.
    Bug("served_in_fp16", "test_load_target_is_bit_equal_in_every_layout", load_weights,
        "else dtype",
        "else torch.float16"),
)

DECODING = INPUTS + COMPUTATION + VERIFICATION
