"""
Bugs of decoding, made on purpose. Each is a function that returns a context manager: inside of its
`with` block the real code has one wrong line, as somebody would write it. The docstring says what
people saw, where, and why. docs/bugs.md has what each of them costs.
"""
from unittest import mock

import draft_decode
from benchmarks.slips import Bug, both, slip
from tokenizer import chat_prompt
from checkpoint import load_weights
from decode_state import DecodeState, LinearLayerState, Segment
from draft_decode import Decoder, count_accepted
from model import Attention, DFlashDraftModel
from model import RMSNorm as DrafterRMSNorm
from target import RMSNorm as TargetRMSNorm
from delta_rule import delta_rule_of_window, gated_delta_rule
from target import Target

# --------------------------------------------------------------------------------------------------
# what the drafter is given


def features_one_late():
    """The feature of token t stands at position t + 1, as where features are paired with the token
    after them (EAGLE does that). The newest feature is lost, as the block is written over it."""
    return slip(
        DFlashDraftModel.write_context,
        "position[:, None] + torch.arange(T",
        "position[:, None] + 1 + torch.arange(T")


def taps_one_early():
    """Id i read as transformers' hidden_states[i], which is what goes into layer i. Seen in
    onnxruntime-genai #2460, where acceptance stuck at exactly 1.000."""
    return slip(
        Target.forward,
        "if i in target_layer_ids:",
        "if i + 1 in target_layer_ids:")


def taps_one_late():
    """Ids counted from 1 by whoever reads them: each feature is the output of the next layer."""
    return slip(
        Target.forward,
        "if i in target_layer_ids:",
        "if i - 1 in target_layer_ids:")


def taps_reversed():
    """Features in the order of another list of layers: each block of fc's columns meets the feature
    of another layer. An engine may collect them in a dict, or from the last layer to the first."""
    return slip(
        Target.forward,
        "torch.cat(features, -1)",
        "torch.cat(features[::-1], -1)")


def taps_after_the_norm():
    """Features taken behind the target's last norm, as transformers returns the last of its
    hidden_states."""
    return slip(
        Target.forward,
        "features.append(x)",
        "features.append(self.norm(x))")


def context_through_layer_norm():
    """The context goes through each layer's input_layernorm, as keys and values of all other models
    do. Here hidden_norm has normed it once, for all layers."""
    return slip(
        DFlashDraftModel.write_context,
        "keys_values(context, rotary)",
        "keys_values(layer.input_layernorm(context), rotary)")


def context_of_the_prompt_only():
    """Features of the answer are never written: the drafter knows the prompt, and then less and
    less of what the target reads. Acceptance falls with length."""
    return slip(
        Decoder.round_kernels,
        "drafter.write_context(features, self.cache, state.position)",
        "pass")


def context_after_commit():
    """The context is written after the commit has moved the position: the features of a block stand
    behind it, where the next block is written over them."""
    return slip(
        Decoder.round_kernels,
        "features, self.cache, state.position)",
        "features, self.cache, state.position + accepted + 1)")


def mask_id_one_low():
    """The mask is the last id of the tokenizer, not the first free one: its embedding is that of a
    real token."""
    return slip(
        DFlashDraftModel.embed_block,
        "self.mask_token_id",
        "self.mask_token_id - 1")


def thinking_left_on():
    """Trained without thinking, served by an engine whose default is to think: the prompt ends with
    an open thought. Seen in z-lab/dflash #133, 25 % accepted instead of 60 %."""
    return slip(
        chat_prompt,
        "enable_thinking=thinking",
        "enable_thinking=True")


def empty_thought_left_out():
    """Served with a chat template that knows no thinking: the empty thought of the training rows is
    not there, and the answer begins right after the assistant's header."""
    return slip(
        chat_prompt,
        "enable_thinking=thinking,",
        r'chat_template=tokenizer.chat_template.replace(r"<think>\n\n</think>\n\n", ""),')


# --------------------------------------------------------------------------------------------------
# what the drafter computes


def partial_rotary():
    """The drafter rotates a quarter of each head, as its target does: partial_rotary_factor was
    copied with the rest of the target's config.json. Seen as tau 1.2, slots 2 and up never right;
    with a rope factor on one side only as 13 % instead of 60 % (z-lab/dflash #66, #126)."""
    return slip(
        DFlashDraftModel.rotary,
        "self.config.head_dim",
        "self.config.head_dim // 4")


def rope_theta_lost():
    """rope_theta is not found where a loader looks for it, so the old default of 10,000 is taken:
    transformers 5 writes it inside rope_parameters only, older readers look at the top."""
    return slip(
        DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        "10000.0")


def rope_theta_of_another():
    """The theta of another model in the drafter: a thousand times too large."""
    return slip(
        DFlashDraftModel.rotary,
        'self.config.rope_parameters["rope_theta"]',
        '1000 * self.config.rope_parameters["rope_theta"]')


def causal_block():
    """A causal mask inside the block, the default of every attention kernel of an engine: a slot
    does not see the masks behind it. Seen as 98 % in training, 10 % served."""
    return slip(
        Attention.decode,
        "key_position <= last_position.expand_as(query_position)",
        "key_position <= query_position")


def block_one_late():
    """The slots of a block are rotated for positions that begin after the anchor instead of at
    it."""
    return slip(
        DFlashDraftModel.decode_block,
        "self.rotary(positions)",
        "self.rotary(positions + 1)")


def gain_read_as_1_plus_w():
    """The drafter's norms read as the target's: (1 + w) x in place of w x."""
    return slip(
        DrafterRMSNorm.forward,
        "to_fp32(self.weight)",
        "1 + to_fp32(self.weight)")


def last_norm_left_out():
    """The target's head gets the drafter's residual stream without the drafter's last norm: an
    engine whose models return hidden states before it."""
    return slip(
        DFlashDraftModel.decode_block,
        "return self.norm(x)",
        "return x")


def noise_of_its_own():
    """Guesses drawn from the drafter's softmax with noise of their own: a guess is then right as
    often as two draws agree. Seen in z-lab/dflash #169, 1.16 tokens a round instead of 2.96."""
    return slip(
        Decoder.guesses,
        "logits.argmax(-1)",
        "torch.distributions.Categorical(logits=logits).sample()")


# --------------------------------------------------------------------------------------------------
# what is accepted and committed


def right_after_a_wrong_one():
    """Guesses counted that are right but stand after a wrong one: tokens are returned that the
    target chose after a guess of which it thought nothing. tau looks better for it."""
    return slip(
        count_accepted,
        "right.long().cumprod(-1)",
        "right.long()")


def bonus_from_the_last_row():
    """The target's own token taken from the last row, which is right only where all guesses were
    accepted."""
    return slip(
        Decoder.round_kernels,
        "self.anchor.copy_(choices.gather(1, accepted[:, None])[:, 0])",
        "self.anchor.copy_(choices[:, -1]); "
        "choices.scatter_(1, accepted[:, None], self.anchor[:, None])")


def commit_one_short():
    """The accepted guesses are committed and the anchor is not counted: one row too few."""
    return slip(
        Decoder.round_kernels,
        "(accepted + 1) * self.is_active",
        "accepted * self.is_active")


def verification_not_causal():
    """The rows of a check see the whole block, as the drafter's slots do: the target reads the
    guesses that it is asked to judge."""
    return slip(
        DecodeState.begin_forward,
        "self.row_positions[..., None]",
        "self.row_positions[:, -1:, None]")


def rejected_state_kept():
    """One matrix S, as most projects keep it, and nobody puts it back after a rejection: keys and
    values are cropped, but S keeps what rejected guesses wrote. Seen in z-lab/dflash #172 and
    transformers #49036, where 12 to 41 of 384 choices changed, by margins of 0.6 to 2.4."""
    def delta_rule(self, q, k, v, g, beta):
        o, S = gated_delta_rule(q, k, v, g, beta, self.S)
        self.S.copy_(S)            # after all rows of the block, whatever will be committed
        self.S_chunk_end.copy_(S)  # so commit(n) cannot put it back
        return o

    def prefill(target, tokens, state, target_layer_ids=(), graphs=None):
        # as one segment, so that no row pads a block
        n = tokens.shape[1]
        state.reset()
        features, hidden = target(tokens, state, target_layer_ids, segment=Segment(0, n))
        state.commit(n)
        return features, target.logits(hidden[:, -1:])[:, 0]

    return both(
        mock.patch.object(LinearLayerState, "delta_rule", delta_rule),
        mock.patch.object(draft_decode, "prefill", prefill))


def conv_memory_kept():
    """The short convolution remembers the last tokens of the block, accepted or not: three tokens,
    which the next three rows see. Beside S this is the second thing that a crop forgets."""
    return slip(
        Decoder.round_kernels,
        "state.commit((accepted + 1) * self.is_active)",
        "state.commit((accepted + 1) * self.is_active); "
        "state.conv[:, :, :3] = state.conv[:, :, -3:]")


def state_of_the_second_chunk():
    """S after the whole window becomes the state of its first chunk: a delta rule that is right for
    one token at a time, and wrong after a block."""
    return slip(
        delta_rule_of_window,
        "if i == 0:",
        "if i <= 1:")


def target_gain_read_as_w():
    """The target's norms read as plain ones: w x in place of (1 + w) x."""
    return slip(
        TargetRMSNorm.forward,
        "1 + to_fp32(self.weight)",
        "to_fp32(self.weight)")


def served_in_bf16():
    """No bug: bfloat16 instead of float32, to see what rounding does to the same figures."""
    return slip(load_weights, "else dtype", "else torch.bfloat16")


def served_in_fp16():
    """Weights and activations in fp16, which ends at 65,504: people saw acceptance collapse in an
    engine, where large activations overflow."""
    return slip(load_weights, "else dtype", "else torch.float16")


# --------------------------------------------------------------------------------------------------

TRAINED_FORM = "test_drafter_decodes_as_it_was_trained"
WHOLE_ROUNDS = "test_training_form_predicts_decoded_rounds"
TRANSFORMERS = "test_target_equals_transformers"
CHAT = "test_chat_prompt_has_the_empty_thought"
ROTARY = "test_failure_3_partial_rotary_stays_with_the_target"
LOOP = "test_generate_ends_at_the_limit"
STATE = "test_cuts_rejected_block"

DECODING = (
    Bug(features_one_late, 1, TRAINED_FORM),
    Bug(taps_one_early, 4, TRANSFORMERS),
    Bug(taps_one_late, 4, TRANSFORMERS),
    Bug(taps_reversed, 4, TRANSFORMERS),
    Bug(taps_after_the_norm, 4, TRANSFORMERS),
    Bug(context_through_layer_norm, None, TRAINED_FORM),
    Bug(context_of_the_prompt_only, None, WHOLE_ROUNDS),
    Bug(context_after_commit, None, WHOLE_ROUNDS),
    Bug(mask_id_one_low, 10, "test_block_is_the_anchor_and_masks"),
    Bug(thinking_left_on, 9, CHAT),
    Bug(empty_thought_left_out, 9, CHAT),
    Bug(partial_rotary, 3, ROTARY),
    Bug(rope_theta_lost, 10, ROTARY),
    Bug(rope_theta_of_another, 10, ROTARY),
    Bug(causal_block, 2, TRAINED_FORM),
    Bug(block_one_late, 2, TRAINED_FORM),
    Bug(gain_read_as_1_plus_w, 10, "test_drafter_equals_basic"),
    Bug(last_norm_left_out, None, TRAINED_FORM),
    Bug(noise_of_its_own, 11, "test_guesses_are_greedy_where_the_target_is", 1.0),
    Bug(right_after_a_wrong_one, 15, "test_accept_counts_up_to_the_first_difference"),
    Bug(bonus_from_the_last_row, 5, LOOP),
    Bug(commit_one_short, 6, LOOP),
    Bug(verification_not_causal, 5, STATE),
    Bug(rejected_state_kept, 6, STATE),
    Bug(conv_memory_kept, 6, LOOP),
    Bug(state_of_the_second_chunk, 8, STATE),
    Bug(target_gain_read_as_w, 10, TRANSFORMERS),
    Bug(served_in_bf16, None, ""),
    Bug(served_in_fp16, 10, "test_load_target_is_bit_equal_in_every_layout"),
)
