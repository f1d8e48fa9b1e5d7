"""
Bugs of decoding, injected on purpose. Each one puts one wrong line into the real code, as somebody
would write it. The comment above a bug says what it is, why people write it, and what they saw.
docs/bugs.md has the cost of each.
"""
import draft_decode
from benchmarks.inject_bug import Bug, Edit
from checkpoint import load_weights
from decode_state import DecodeState, LinearLayerState
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
    # The feature of token t is stored at position t + 1, because some methods (EAGLE) pair features
    # with the next token. The newest feature is lost, because the block overwrites it.
    Bug("features_one_late", TRAINED_FORM, Edit(
        DFlashDraftModel.write_context,
        "position[:, None] + offsets",
        "position[:, None] + 1 + offsets")),

    # Id i is read as transformers' hidden_states[i], which is the input of layer i. Seen in
    # onnxruntime-genai #2460, where acceptance stayed at exactly 1.000.
    Bug("feature_layers_one_early", TRANSFORMERS, Edit(
        Target.forward,
        "if i in target_layer_ids:",
        "if i + 1 in target_layer_ids:")),

    # Ids are counted from 1, so each feature is the output of the next layer.
    Bug("feature_layers_one_late", TRANSFORMERS, Edit(
        Target.forward,
        "if i in target_layer_ids:",
        "if i - 1 in target_layer_ids:")),

    # The features come in another order of layers, so fc's columns meet the wrong ones. An engine
    # can collect them in a dict, or from the last layer to the first.
    Bug("feature_layers_reversed", TRANSFORMERS, Edit(
        Target.forward,
        "torch.cat(features, -1)",
        "torch.cat(features[::-1], -1)")),

    # Features are taken after the target's last norm, because the last of transformers'
    # hidden_states is normed.
    Bug("feature_layers_after_the_norm", TRANSFORMERS, Edit(
        Target.forward,
        "features.append(x)",
        "features.append(self.norm(x))")),

    # Each layer's input_layernorm is applied to the context, because other models do so. Here
    # hidden_norm has already normed it, once for all layers.
    Bug("context_through_layer_norm", TRAINED_FORM, Edit(
        DFlashDraftModel.write_context,
        "keys_values(context, rotary)",
        "keys_values(layer.input_layernorm(context), rotary)")),

    # Features of the answer are never written, so the drafter knows the prompt only. Acceptance
    # falls with the length of the answer.
    Bug("context_of_the_prompt_only", WHOLE_ROUNDS, Edit(
        Decoder.commit,
        "self.drafter.write_context(features, self.cache, self.state.position)",
        "pass")),

    # The context is written after the commit has moved the position. So a block's features come
    # after the block, and the next block overwrites them.
    Bug("context_after_commit", WHOLE_ROUNDS, Edit(
        Decoder.commit,
        "features, self.cache, self.state.position)",
        "features, self.cache, self.state.position + accepted + 1)")),

    # The mask is the last id of the tokenizer instead of the first free one, so its embedding is
    # that of a real token.
    Bug("mask_id_one_low", "test_block_is_the_anchor_and_masks", Edit(
        DFlashDraftModel.embed_block,
        "self.mask_token_id",
        "self.mask_token_id - 1")),

    # Trained without thinking, but the engine thinks by default, so the prompt ends with an open
    # thought. Seen in z-lab/dflash #133: 25 % accepted instead of 60 %.
    Bug("thinking_left_on", CHAT, Edit(
        chat_text,
        "enable_thinking=thinking",
        "enable_thinking=True")),

    # The engine's chat template has no thinking. So the empty thought of the training rows is
    # missing, and the answer begins right after the assistant's header.
    Bug("empty_thought_left_out", CHAT, Edit(
        chat_text,
        "enable_thinking=thinking",
        r'chat_template=tokenizer.chat_template.replace(r"<think>\n\n</think>\n\n", "")')),
)

COMPUTATION = (
    # The drafter rotates a quarter of each head, because partial_rotary_factor was copied with the
    # rest of the target's config.json. Seen as tau 1.2 with slots 2 and up never right. With a rope
    # factor on one side only: 13 % instead of 60 % (z-lab/dflash #66, #126).
    Bug("partial_rotary", ROTARY, Edit(
        DFlashDraftModel.rotary,
        "self.config.head_dim",
        "self.config.head_dim // 4")),

    # A loader does not find rope_theta and uses the old default of 10,000. transformers 5 writes it
    # only inside rope_parameters, and older readers look at the top level.
    Bug("rope_theta_lost", ROTARY, Edit(
        DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        "10000.0")),

    # The drafter has the theta of another model, a thousand times too large.
    Bug("rope_theta_of_another", ROTARY, Edit(
        DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        '1000 * self.config.rope_parameters["rope_theta"]')),

    # The mask inside the block is causal, which is the default of every engine's attention kernel.
    # So a slot does not see the masks after it. Seen as 98 % in training, 10 % served.
    Bug("causal_block", TRAINED_FORM, Edit(
        Attention.decode,
        "key_position <= last_position.expand_as(query_position)",
        "key_position <= query_position")),

    # A block is rotated for positions that begin after the anchor instead of at the anchor.
    Bug("block_one_late", TRAINED_FORM, Edit(
        DFlashDraftModel.decode_block,
        "self.rotary(positions)",
        "self.rotary(positions + 1)")),

    # The drafter's norms are read like the target's: (1 + w) x instead of w x.
    Bug("gain_read_as_1_plus_w", "test_drafter_equals_basic", Edit(
        DrafterRMSNorm.forward,
        "to_fp32(self.weight)",
        "1 + to_fp32(self.weight)")),

    # The target's head gets the drafter's output without the drafter's last norm, because an
    # engine's models return hidden states before it.
    Bug("last_norm_left_out", TRAINED_FORM, Edit(
        DFlashDraftModel.decode_block,
        "return self.norm(x)",
        "return x")),

    # Guesses are sampled with the drafter's own noise, so a guess is right as often as two
    # independent samples agree. Seen in z-lab/dflash #169: 1.16 tokens per round instead of 2.96.
    Bug("noise_of_its_own", "test_guesses_are_greedy_where_the_target_is", Edit(
        Decoder.draft,
        "logits.argmax(-1)",
        "torch.distributions.Categorical(logits=logits).sample()"),
        temperature=1.0),
)

VERIFICATION = (
    # Right guesses count even if they follow a wrong one. Then the output has tokens that the
    # target chose after a guess that it rejected. tau looks better.
    Bug("right_after_a_wrong_one", "test_accept_counts_up_to_the_first_difference", Edit(
        count_accepted,
        "right.long().cumprod(-1)",
        "right.long()")),

    # The target's own token is taken from the last row, which is right only if all guesses were
    # accepted.
    Bug("bonus_from_the_last_row", LOOP, Edit(
        Decoder.accept,
        "self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])",
        "self.anchor.copy_(choices[:, -1]); "
        "choices.scatter_(1, accepted[:, None], self.anchor[:, None])")),

    # The accepted guesses are committed, but the anchor is not counted.
    Bug("commit_one_short", LOOP, Edit(
        Decoder.commit,
        "(accepted + 1) * self.is_active",
        "accepted * self.is_active")),

    # Verification attends to the whole block, like the drafter. So the target sees the guesses
    # that it has to judge.
    Bug("verification_not_causal", STATE, Edit(
        DecodeState.begin_forward,
        "self.token_positions[..., None]",
        "self.token_positions[:, -1:, None]")),

    # There is one matrix S, as in most projects, and nobody restores it after a rejection. Keys and
    # values are cropped, but S keeps what rejected guesses wrote. Seen in z-lab/dflash #172 and
    # transformers #49036, where 12 to 41 of 384 choices changed, with margins of 0.6 to 2.4.
    # (The prompt must be prefilled as one segment here, because no token may pad a block.)
    Bug("rejected_state_kept", STATE, Edit(
        LinearLayerState.delta_rule,
        "state = self.state\n",
        "state = self.state\n"
        "    if state.forward_is_block:\n"
        "        o, S = gated_delta_rule(q, k, v, g, beta, S=self.S)\n"
        "        self.S.copy_(S)\n"
        "        self.S_chunk_end.copy_(S)\n"
        "        return o\n"), Edit(
        draft_decode.prefill,
        "n = tokens.shape[1]\n",
        "n = tokens.shape[1]\n"
        "    state.reset()\n"
        "    features, hidden = target(tokens, state, target_layer_ids, segment=Segment(0, n))\n"
        "    state.commit(n)\n"
        "    return features, target.logits(hidden[:, -1:])[:, 0]\n")),

    # The short convolution keeps the last three tokens of the block, accepted or not, and the next
    # three tokens see them. It is the second thing, after S, that cropping a cache forgets.
    Bug("conv_memory_kept", LOOP, Edit(
        Decoder.commit,
        "self.state.commit((accepted + 1) * self.is_active)",
        "self.state.commit((accepted + 1) * self.is_active); "
        "self.state.conv[:, :, :3] = self.state.conv[:, :, -3:]")),

    # S after the whole window is used as the state after its first chunk. Such a delta rule is
    # right for one token at a time and wrong after a block.
    Bug("state_of_the_second_chunk", STATE, Edit(
        delta_rule_of_window,
        "if i == 0:",
        "if i <= 1:")),

    # The target's norms are read as plain ones: w x instead of (1 + w) x.
    Bug("target_gain_read_as_w", TRANSFORMERS, Edit(
        TargetRMSNorm.forward,
        "1 + to_fp32(self.weight)",
        "to_fp32(self.weight)")),

    # Not a bug: bfloat16 instead of float32 shows what rounding does to the same figures.
    Bug("served_in_bf16", None, Edit(
        load_weights,
        "else dtype",
        "else torch.bfloat16")),

    # Weights and activations are in fp16, whose largest number is 65,504. People saw acceptance
    # collapse in an engine, because large activations overflow.
    Bug("served_in_fp16", "test_load_target_is_bit_equal_in_every_layout", Edit(
        load_weights,
        "else dtype",
        "else torch.float16")),
)

DECODING = INPUTS + COMPUTATION + VERIFICATION
