"""
Every test of the project. None needs the network, a GPU, or files that are not in the repository.

    python test_all.py                    # all, five minutes on two cores
    python test_all.py fast               # the promises of the README, a minute
    python test_all.py test_kernel        # the tests of one or more files in tests/
    python test_all.py cuts resume        # tests with "cuts" or "resume" in their name
    python test_all.py -k "cuts and bf16" # options of pytest

Each test's docstring names the failure that it catches. "Failure 5" in a docstring is number 5 of
this list of failures that people reported with this method:

    1  training leaks, or labels are off by one
    2  labels, mask, or blocks differ from decoding
    3  the drafter's rotary embedding is wrong
    4  features come from the wrong target layer
    5  the output differs from the target alone
    6  a rejected block leaves traces
    7  the logits of all anchors exist at once
    8  the state is wrong after a block of 16
    9  the chat template differs when served
    10 rope_theta is dropped, or the target is the wrong one
    11 temperature is ignored
    12 a resumed run is a different run
    13 the loss depends on the split into micro-batches and processes
    14 shapes vary, so code compiles again
    15 a benchmark flatters

tests/test_bugs.py injects such bugs, one at a time, and checks that the named test fails.
tests/try_bug.py tries a bug of your own.
"""
import os
import sys

import pytest

TESTS = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tests")
FAST = ("test_readme", "test_basic", "test_drafter", "test_loss", "test_decode_state",
        "test_sampling", "test_cli")


def main():
    files = []
    words = []
    options = []
    for i, argument in enumerate(sys.argv[1:], 1):
        path = os.path.join(TESTS, argument.removesuffix(".py") + ".py")
        if argument.startswith("-"):
            options = sys.argv[i:]
            break
        elif argument == "fast":
            files += [os.path.join(TESTS, name + ".py") for name in FAST]
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
