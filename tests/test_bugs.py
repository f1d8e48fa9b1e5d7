"""
The bugs that are injected on purpose. Each one is caught by the test that it names, is removed
without a trace, and is measured and documented under its own name.
"""
import gzip
import inspect
import json
import os

import pytest
import torch

import train
from benchmarks import bugs, bugs_page, exactness
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.inject_bug import inject_bug
from data.nano import prepare
from draft_decode import count_accepted
from tests import (test_basic, test_data, test_decode_state, test_drafter, test_generate, test_loss,
                   test_sampling, test_target, test_train)
from tests.common import FULL, ROOT

BUGS = {bug.name: bug for bug in (*DECODING, *TRAINING)}
HARMLESS = ("served_in_bf16",)  # it is not a bug, so no test fails

# ------------------------------------------------------------------------------------------------
# each bug is caught by name

FULL_LAYERS = {"layer_types": (FULL, FULL), "window": None}
# the tests that bugs name, with the arguments of the cheapest case that catches these bugs
TESTS = {
    test_basic.test_drafter_equals_basic: {"shape": "tied"},
    test_basic.test_loss_and_gradients_equal_basic: {"shape": "tied", "anchors": [18, 25, 39]},
    test_data.test_chat_prompt_has_the_empty_thought: {},
    test_data.test_prepared_rows_begin_with_chat_prompt: {},
    test_decode_state.test_cuts_rejected_block: {"accepted": 12},
    test_drafter.test_block_is_the_anchor_and_masks: {},
    test_drafter.test_drafter_decodes_as_it_was_trained: FULL_LAYERS,
    test_drafter.test_failure_3_partial_rotary_stays_with_the_target: {},
    test_drafter.test_leak_from_future_features_or_other_blocks: FULL_LAYERS,
    test_generate.test_accept_counts_up_to_the_first_difference: {},
    test_generate.test_generate_ends_at_the_limit: {"limit": 30},
    test_generate.test_training_form_predicts_decoded_rounds: {},
    test_loss.test_anchors_are_supervised_distinct_and_static: {"count": 8},
    test_sampling.test_guesses_are_greedy_where_the_target_is: {},
    test_target.test_load_target_is_bit_equal_in_every_layout: {
        "shape": "tied", "prefix": "model.", "shards": 1},
    test_target.test_target_equals_transformers: {"shape": "tied", "T": 16},
    test_train.test_batches_are_cut_and_padded: {"max_length": 59},
    test_train.test_leak_from_features_at_other_places: {},
    test_train.test_step_has_the_loss_of_its_keys: {"weighting": "decay"},
}
seen = test_train.seen  # a fixture that one of them needs
PASSED = set()  # names of those that passed in this process while no bug was on


@pytest.fixture
def run_test(request):
    """run_test(name) runs a test of TESTS by its name, with its arguments and fixtures."""
    by_name = {test.__name__: test for test in TESTS}

    def call(name):
        test = by_name[name]
        arguments = TESTS[test]
        fixtures = inspect.signature(test).parameters.keys() - arguments.keys()
        values = {fixture: request.getfixturevalue(fixture) for fixture in fixtures}
        test(**arguments, **values)
    return call


@pytest.mark.parametrize("name", sorted(BUGS.keys() - HARMLESS))
def test_bug_is_caught_by_the_test_it_names(run_test, name):
    """A bug that the suite does not catch; a bug that is on all the time; a bug that is not silent.
    (An error other than AssertionError ends this test.)"""
    bug = BUGS[name]
    if bug.caught_by not in PASSED:
        run_test(bug.caught_by)
        PASSED.add(bug.caught_by)
    with bug.injected():
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run_test(bug.caught_by)


def test_inject_bug_reaches_every_name_and_is_removed():
    """A bug that reaches only one of a function's names, that stays on after its block or after an
    error in it, or whose line is no longer in the code, so that correct code is measured."""
    def accepted():
        guesses = torch.tensor([[5, 0, 7]])
        choices = torch.tensor([[5, 6, 7, 8]])
        return count_accepted(guesses, choices).item()

    with pytest.raises(KeyboardInterrupt):
        with inject_bug(count_accepted, ".cumprod(-1)", ""):
            assert accepted() == 2
            raise KeyboardInterrupt
    assert accepted() == 1
    for text in ("no such text", "choices"):  # missing, and there twice
        with pytest.raises(ValueError, match="count_accepted contains"):
            with inject_bug(count_accepted, text, "x"):
                pass

# ------------------------------------------------------------------------------------------------
# the command


def test_bugs_are_measured(run_bench, monkeypatch, tmp_path):
    """A bug that is off while it is measured, or on in a clean run or in the decoding after a
    training; a bug that is measured at another temperature than its clean run; a misspelled name
    that measures nothing, without an error. Training takes two steps on a few answers here."""
    with gzip.open(prepare.answers, "rt") as f:
        lines = f.readlines()
    few_answers = tmp_path / "few.jsonl.gz"
    with gzip.open(few_answers, "wt") as f:
        f.writelines([*lines[:8], *lines[-8:]])  # the last lines are of the split val
    monkeypatch.setattr(prepare, "answers", str(few_answers))
    for name, value in (("STEPS", 2), ("ROWS", 4), ("SEEDS", (0,)), ("TRAINED_PROMPTS", 1)):
        monkeypatch.setattr(bugs, name, value)
    monkeypatch.setattr(train, "EVAL_SAMPLES", 2)
    rows = run_bench("bugs", "--limit=1", "--max_new_tokens=24",
                     "--only=target_gain_read_as_w,noise_of_its_own,features_after_the_norm")["rows"]
    assert [(row["bug"], row.get("temperature")) for row in rows] == [
        ("clean", 0.0), ("clean", 1.0), ("noise_of_its_own", 1.0), ("target_gain_read_as_w", 0.0),
        ("clean", None), ("features_after_the_norm", None)]
    for row in rows:
        if row["bug"] == "target_gain_read_as_w":
            assert row["identical"] == 0
            (position, margin), = row["margins"]
            assert position == 0
            assert margin > 1
        else:
            assert row["identical"] == 1
            assert row["margins"] == []
    early, in_place, late = rows[0]["right_at_shift"]
    assert in_place > 0.5 > max(early, late)
    assert rows[4]["estimated_loss"] != rows[5]["estimated_loss"]
    assert (tmp_path / "bugs.png").stat().st_size > 1000
    with pytest.raises(SystemExit, match="--only=leak is not a bug: use decoding, training, or"):
        run_bench("bugs", "--only=leak,causal_block")
# ------------------------------------------------------------------------------------------------
# the table of docs/bugs.md


def row_of(kind, name, tau, **more):
    row = {"kind": kind, "bug": name, "tau": tau, "identical": 1.0, "margins": [],
           "right_at_shift": [0.02, 0.5, 0.1]}
    if kind == "decoding":
        row["temperature"] = 0.0
    return row | more


def test_bugs_table_by_hand():
    """Figures of another bug, of one seed, or of the wrong clean run in a row of the table; an
    order other than that of the damage."""
    report = {"rows": [
        row_of("decoding", "clean", 8.0),
        row_of("decoding", "clean", 2.0, temperature=1.0),
        row_of("decoding", "causal_block", 4.0),
        row_of("decoding", "rejected_state_kept", 8.0, identical=0.25,
               margins=[[3, 0.5], [1, 2.0], [9, None]]),
        row_of("training", "clean", 3.0, estimate=4.0),
        row_of("training", "clean", 4.0, estimate=5.0),
        row_of("training", "labels_one_late", 1.0, estimate=4.0, right_at_shift=[0.1, 0.2, 0.4]),
        row_of("training", "labels_one_late", 2.0, estimate=6.0, right_at_shift=[0.1, 0.0, 0.6])]}
    assert bugs_page.table(report).splitlines()[2:] == [
        "| `rejected_state_kept` | 8.00 -> 8.00 | - | 0.02 / 0.50 / 0.10 | 25% | 0.50 to 2.00 "
        "| `test_cuts_rejected_block` |",
        "| `labels_one_late` | 3.50 -> 1.50 | 4.50 -> 5.00 | 0.10 / 0.10 / 0.50 | 100% | - "
        "| `test_loss_and_gradients_equal_basic` |",
        "| `causal_block` | 8.00 -> 4.00 | - | 0.02 / 0.50 / 0.10 | 100% | - "
        "| `test_drafter_decodes_as_it_was_trained` |"]


def test_bugs_page_has_the_table_of_the_log_and_tells_every_bug():
    """A table that is older than the log; a bug that the decision tree or the text leaves out."""
    with open(os.path.join(ROOT, "benchmarks", "results", "bugs_nano.json")) as f:
        report = json.load(f)
    with open(os.path.join(ROOT, "docs", "bugs.md")) as f:
        page = f.read()
    tree, has_table, _ = page.partition(bugs_page.table(report))
    assert has_table
    for bug in BUGS:
        assert f"`{bug}`" in tree, bug
        assert f"\n- `{bug}`: " in page, bug
    assert {row.get("bug") for row in report["rows"]} >= BUGS.keys()


@pytest.mark.parametrize("identical, margin, dtype, expected", (
    (True, None, "float32", exactness.EQUAL),
    (False, None, "float32", exactness.UNKNOWN),
    (False, 0.001, "float32", exactness.ROUNDING),
    (False, 0.16, "float32", exactness.WRONG),      # float32 does not round that far
    (False, 0.16, "bfloat16", exactness.ROUNDING),
    (False, 0.6, "bfloat16", exactness.WRONG)))
def test_bugs_verdict(identical, margin, dtype, expected):
    """Failures 5 and 6: rounding taken for a broken state, or the other way around."""
    assert exactness.verdict(identical, margin, dtype) == expected
