"""
Every test of the project. None needs the network, a GPU or files that are not in the repository.

    python test_all.py                    # all, five minutes on two cores
    python test_all.py test_kernel        # those of a file in tests/; several may be named
    python test_all.py cuts resume        # those with "cuts" or "resume" in their name
    python test_all.py -k "cuts and bf16" # after names, if any: options of pytest

Each test's docstring names the failure it catches. The numbers are those of the table of failures
that people reported with this method (training accuracy 0.99, acceptance 0.12; greedy output that
differs; ...):

    1  training leaks, or is off by one
          test_drafter and test_train: test_leak_*
          test_generate: test_training_form_predicts_decoded_rounds
    2  labels, mask or blocks are not those of serving
          test_basic: test_loss_*, test_drafter_*; test_drafter: test_drafter_*;
          test_train: test_leak_*
    3  the drafter's rotary embedding
          test_basic: test_drafter_equals_basic; test_drafter: test_failure_3_*
    4  features of the wrong target layer
          test_target: test_target_equals_transformers, test_failure_4_*; test_drafter: test_taps_*
    5  output differs from the target alone
          test_decode_state: test_cuts_*; test_generate: test_generate_is_identical_*
          test_slots, test_cuda_graph: all of it
          test_prefill: test_prefill_padding_changes_no_bit
    6  a rejected block leaves traces
          test_decode_state: test_cuts_rejected_block, test_cuts_propose_twice
    7  logits of all anchors at once
          test_loss: test_loss_never_holds_all_logits
    8  wrong state after a block of 16
          test_kernel: all of it; test_basic: test_blocks_*
    9  another chat template when served
          test_data: test_failure_9_*, test_chat_*, test_prepare*
    10 rope_theta dropped, wrong target
          test_checkpoint: all of it; test_target: test_load_target_*
    11 temperature ignored
          test_sampling: all of it; test_generate: test_sampled_*
    12 resuming is another run
          test_train: test_resume_*, test_ranks_are_the_same_run
    13 the loss depends on the split into micro-batches and ranks
          test_train: test_step_does_not_depend_on_the_split, test_ranks_are_the_same_run
          test_scaling: test_scaling_arms_do_the_same_work
    14 shapes that vary
          test_loss: test_anchors_*; test_train: test_batches_*
          test_prefill: test_prefill_of_all_lengths_is_one_graph
    15 a flattering benchmark
          test_generate: test_generate_ends_*; test_bench, test_speed and test_scaling:
          all of it

test_bugs makes such bugs on purpose, one at a time, and sees that the test which shall catch it
fails.
"""
import os
import sys

import pytest

TESTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests")


def main():
    files = []
    words = []
    options = []
    for i, argument in enumerate(sys.argv[1:], 1):
        path = os.path.join(TESTS, argument.removesuffix(".py") + ".py")
        if argument.startswith("-"):
            options = sys.argv[i:]
            break
        elif os.path.isfile(path):
            files.append(path)
        else:
            words.append(argument)
    if words:
        options += ["-k", " or ".join(words)]
    if not files:
        files = [TESTS]
    # one process for each core, each with one thread
    sys.exit(pytest.main(["-n", "auto", *options, *files]))


if __name__ == "__main__":
    main()
