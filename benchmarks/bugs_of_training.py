"""
Training bugs, injected on purpose, in the form of benchmarks/bugs_of_decoding.py. Training runs the
wrong line, including its estimate of tau, and decoding runs the right one. This is how people meet
such bugs: the loss falls, the estimate is fine or too good, and the drafter guesses badly.
"""
from benchmarks.inject_bug import Bug
from data.nano.prepare import read_answers
from fast.attention import grouped_attend
from loss import block_labels, sample_anchors
from model import block_visibility
from target import Target
from train import micro_batch_loss, pad

# the tests that catch several of them
LEAK = "test_leak_from_future_features_or_other_blocks"
LABELS = "test_loss_and_gradients_equal_basic"

TRAINING = (
    # The context includes the features of the anchor, which do not exist yet during decoding. The
    # target computed them to predict the token that position 1 has to guess. Seen on Qwen3.5-0.8B
    # as accuracy 0.99 in training and acceptance 0.12.
    Bug("anchor_in_the_context", LEAK, block_visibility,
        "before_anchor = key < anchor",
        "before_anchor = key <= anchor",
        also=(grouped_attend, ".max())", ".max()) + 1")),

    # The context has no mask, so each block sees the features of the tokens that it has to guess.
    Bug("whole_text_in_the_context", LEAK, block_visibility,
        "before_anchor = key < anchor",
        "before_anchor = (key < T) & (anchor >= 0)",
        also=(grouped_attend, "int(anchors[:, first:first + group_size].max())", "T")),

    # The feature of token t + 1 is at position t, because a shift that belongs to the labels was
    # applied to the features. So the last feature that a block sees is its anchor's.
    Bug("features_one_early", "test_leak_from_features_at_other_places", micro_batch_loss,
        "features = run.target_features(tokens)",
        "features = run.target_features(tokens).roll(-1, 1)"),

    # All blocks of a text attend to each other, so a block sees later anchors, which are tokens
    # that it has to guess. Seen as 98 % in training, 10 % served.
    Bug("blocks_see_one_another", LEAK, block_visibility,
        "(key >= T) & (block_of_key == block_of_query)",
        "key >= T"),

    # Trained with a causal mask inside the block, served without one.
    Bug("causal_block_in_training", "test_drafter_equals_basic", block_visibility,
        "(block_of_key == block_of_query)",
        "(block_of_key == block_of_query) & ((key - T) % K <= query % K)"),

    # Trained on normed features, because the last of transformers' hidden_states is normed. Served
    # with the residual stream.
    Bug("features_after_the_norm", "test_target_equals_transformers", Target.forward,
        "features.append(x)",
        "features.append(self.norm(x))"),

    # Position k learns the token k + 1 after the anchor, as in a model that predicts the next
    # token. Seen as 98 % in training, 10 % served.
    Bug("labels_one_late", LABELS, block_labels,
        "anchors[:, :, None] + k ",
        "anchors[:, :, None] + k + 1 "),

    # All positions have the same weight, although late guesses seldom count.
    Bug("uniform_positions", LABELS, block_labels,
        "torch.exp(-(k - 1) / gamma)",
        "torch.ones(K - 1)"),

    # Each text's loss is divided by its own weight, so long and short texts count the same. Then
    # the loss depends on the split into micro-batches or processes.
    Bug("mean_of_means", "test_step_has_the_loss_of_its_keys", micro_batch_loss,
        "in_response = weights > 0",
        "in_response = weights > 0; "
        "weights = weights / weights.sum((1, 2), True).clamp(min=1e-9)"),

    # The response is cut into adjacent blocks from a random place, instead of drawing the start of
    # each block. So a text yields fewer blocks. In the paper's trial, tau is 4.94 instead of 5.64.
    Bug("random_cut", "test_anchors_are_supervised_distinct_and_static", sample_anchors,
        "F.pad(candidates, (0, 1))",
        "F.pad(candidates, (0, 1)) & ((torch.arange(T) + torch.randint("
        "16, (B, 1), generator=generator)) % 16 == 0).to(supervised.device)"),

    # The mask of the answer is forgotten, so the drafter also learns to guess questions.
    Bug("prompt_supervised", "test_batches_are_cut_and_padded", pad,
        "torch.from_numpy(sample_mask[:n] > 0)",
        "True"),

    # The rows are answers of a model other than the one that is served, in other words: here "is"
    # where the target writes "=".
    Bug("answers_of_another_writer", "test_prepared_rows_begin_with_chat_prompt", read_answers,
        "json.loads(line)",
        'json.loads(line.replace(" = ", " is "))'),
)
