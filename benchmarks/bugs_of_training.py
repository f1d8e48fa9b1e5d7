"""
Bugs of training, made on purpose, in the form of benchmarks/bugs_of_decoding.py. Training goes
through the wrong line, estimate included, and decoding through the right one: that is how such bugs
are met. The loss falls, the estimate is fine or better than fine, and the drafter guesses badly.
"""
from benchmarks.slips import Bug, both, slip
from data.nano.prepare import read_answers
from fast.cpu import attention_by_anchor_groups
from loss import block_labels, sample_anchors
from model import block_visibility
from target import Target
from train import micro_batch_loss, pad

# --------------------------------------------------------------------------------------------------
# what a block sees


def anchor_in_the_context():
    """The context includes the features of the anchor, which in decoding nobody has yet: they were
    computed to predict the very token that slot 1 shall guess. Seen as accuracy 0.99 in training
    and acceptance 0.12, on Qwen3.5-0.8B itself."""
    return both(
        slip(block_visibility, "key < anchor_position", "key <= anchor_position"),
        slip(attention_by_anchor_groups, ".max())", ".max()) + 1"))


def whole_text_in_the_context():
    """No mask over the context: every block reads the features of the tokens it shall guess."""
    return both(
        slip(block_visibility, "key < anchor_position", "(key < T) & (anchor_position >= 0)"),
        slip(attention_by_anchor_groups, "int(anchors[:, first:first + group_size].max())", "T"))


def features_one_early():
    """The feature of token t + 1 stands at position t, as where a shift that belongs to the labels
    is applied to the features: the last one that a block sees is that of its anchor."""
    return slip(
        micro_batch_loss,
        "features = target_features(run, tokens)",
        "features = target_features(run, tokens).roll(-1, 1)")


def blocks_see_one_another():
    """All blocks of a text attend to one another: a block reads later anchors, which are tokens
    that it shall guess. Seen as 98 % in training, 10 % served."""
    return slip(
        block_visibility,
        "(key >= T) & (block_of_key == block_of_query)",
        "key >= T")


def causal_block_in_training():
    """Trained with a causal mask inside the block, served without one."""
    return slip(
        block_visibility,
        "(block_of_key == block_of_query)",
        "(block_of_key == block_of_query) & ((key - T) % K <= query % K)")


def features_after_the_norm():
    """Trained on normed features, as the last of transformers' hidden_states is, and served with
    the residual stream."""
    return slip(
        Target.forward,
        "features.append(x)",
        "features.append(self.norm(x))")


# --------------------------------------------------------------------------------------------------
# what is learned


def labels_one_late():
    """Slot k learns the token k + 1 after the anchor, as a model that predicts the next token
    would. Seen as 98 % in training, 10 % served."""
    return slip(
        block_labels,
        "anchors[:, :, None] + k ",
        "anchors[:, :, None] + k + 1 ")


def uniform_slots():
    """All slots weigh the same: late slots, which seldom count, take their share of a small
    drafter."""
    return slip(
        block_labels,
        "torch.exp(-(k - 1) / gamma)",
        "torch.ones(K - 1)")


def mean_of_means():
    """The loss of a text is divided by its own weight, so each text counts the same, long or short.
    Split into micro-batches or processes, the loss then depends on the split."""
    return slip(
        micro_batch_loss,
        "inside = weights > 0",
        "inside = weights > 0; weights = weights / weights.sum((1, 2), True).clamp(min=1e-9)")


def random_cut():
    """The response is cut into blocks at a random place, instead of beginning blocks at random
    places: fewer blocks of each text. In the paper's trial tau 4.94 instead of 5.64."""
    return slip(
        sample_anchors,
        "F.pad(candidates, (0, 1))",
        "F.pad(candidates, (0, 1)) & ((torch.arange(T) + torch.randint("
        "16, (B, 1), generator=generator)) % 16 == 0).to(supervised.device)")


def prompt_supervised():
    """The mask of the answer is forgotten, so questions are learned too, which nobody will ask the
    drafter to guess."""
    return slip(
        pad,
        "torch.from_numpy(sample_mask[:n] > 0)",
        "True")


def answers_of_another_writer():
    """The rows are answers of another model than the one that is served: it says the same in other
    words, here "is" where the target writes "=". Features are those of the target that reads
    them."""
    return slip(
        read_answers,
        "json.loads(line)",
        'json.loads(line.replace(" = ", " is "))')


# --------------------------------------------------------------------------------------------------

LEAK = "test_leak_from_future_features_or_other_blocks"
LABELS = "test_loss_and_gradients_equal_basic"

TRAINING = (
    Bug(anchor_in_the_context, 1, LEAK),
    Bug(whole_text_in_the_context, 1, LEAK),
    Bug(features_one_early, 1, "test_leak_from_features_at_other_places"),
    Bug(blocks_see_one_another, 2, LEAK),
    Bug(causal_block_in_training, 2, "test_drafter_equals_basic"),
    Bug(features_after_the_norm, 4, "test_target_equals_transformers"),
    Bug(labels_one_late, 2, LABELS),
    Bug(uniform_slots, None, LABELS),
    Bug(mean_of_means, 13, "test_step_has_the_loss_of_its_keys"),
    Bug(random_cut, None, "test_anchors_are_supervised_distinct_and_static"),
    Bug(prompt_supervised, None, "test_batches_are_cut_and_padded"),
    Bug(answers_of_another_writer, 9, "test_prepared_rows_begin_with_chat_prompt"),
)
