"""
The bugs that are made on purpose: each is caught by a test of this suite, goes without a trace, and
is measured and told as what it is.
"""
import gzip
import inspect
import json
import os

import pytest
import torch

from benchmarks import bugs, bugs_page, exactness
from benchmarks.bugs_of_decoding import DECODING
from benchmarks.bugs_of_training import TRAINING
from benchmarks.slips import slip
from data.nano import prepare
from draft_decode import count_accepted
from tests import (test_basic, test_data, test_decode_state, test_drafter, test_generate, test_loss,
                   test_sampling, test_target, test_train)
from tests.common import FULL, ROOT, nano, tokens_of

BUGS = {bug.name: bug for bug in (*DECODING, *TRAINING)}
HARMLESS = ("served_in_bf16",)  # it is no bug, so no test fails

# ------------------------------------------------------------------------------------------------
# each bug is caught by name

FULL_LAYERS = {"layer_types": (FULL, FULL), "window": None}
# the tests that are named by bugs, with the arguments of the cheapest case that sees the bugs
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
    def call(name):
        for test, arguments in TESTS.items():
            if test.__name__ == name:
                fixtures = inspect.signature(test).parameters.keys() - arguments.keys()
                values = {fixture: request.getfixturevalue(fixture) for fixture in fixtures}
                test(**arguments, **values)
                return
        raise LookupError(f"{name} is not among TESTS")
    return call


@pytest.mark.parametrize("name", sorted(BUGS.keys() - HARMLESS))
def test_bug_is_caught_by_the_test_it_names(run_test, name):
    """A bug that the suite does not see; one that is there although it was not switched on; or one
    that is not silent, since an error stops the test. (That is not an AssertionError.)"""
    bug = BUGS[name]
    if bug.caught_by not in PASSED:
        run_test(bug.caught_by)
        PASSED.add(bug.caught_by)
    with bug.switch():
        with pytest.raises((AssertionError, pytest.fail.Exception)):
            run_test(bug.caught_by)


def test_slip_reaches_every_name_and_goes():
    """A bug that only one of a function's names has, that stays after its block or after an error
    in it, or that is no longer in the code, so that a right function is measured as a wrong one."""
    def accepted():
        guesses = torch.tensor([[5, 0, 7]])
        choices = torch.tensor([[5, 6, 7, 8]])
        return count_accepted(guesses, choices).item()

    with slip(count_accepted, ".cumprod(-1)", ""):
        assert accepted() == 2
    assert accepted() == 1
    with pytest.raises(KeyboardInterrupt):
        with slip(count_accepted, ".cumprod(-1)", ""):
            raise KeyboardInterrupt
    assert accepted() == 1
    for text in ("no such text", "choices"):  # not there, and there twice
        with pytest.raises(ValueError, match="count_accepted holds"):
            with slip(count_accepted, text, "x"):
                pass

# ------------------------------------------------------------------------------------------------
# the command


@pytest.fixture
def short_training(monkeypatch, tmp_path):
    """Bugs of training are measured by a few steps of one seed, on rows of a few answers."""
    with gzip.open(prepare.answers, "rt") as f:
        lines = f.readlines()
    few_answers = tmp_path / "few.jsonl.gz"
    with gzip.open(few_answers, "wt") as f:
        f.writelines([*lines[:8], *lines[-8:]])  # those of the split val are the last
    monkeypatch.setattr(prepare, "answers", str(few_answers))
    monkeypatch.setattr(bugs, "STEPS", 2)
    monkeypatch.setattr(bugs, "ROWS", 4)
    monkeypatch.setattr(bugs, "SEEDS", (0,))
    monkeypatch.setattr(bugs, "TRAINED_PROMPTS", 1)
    monkeypatch.setattr(bugs, "FLAGS", (*bugs.FLAGS, "--eval_samples=2"))


def test_bugs_are_measured(run_bench, short_training, tmp_path):
    """A bug that is not on while it is measured, or a clean run that has one; training with a bug
    that also decodes with it; a bug measured at another temperature than its clean run."""
    report = run_bench("bugs", "--limit=1", "--max_new_tokens=24",
                       "--only=target_gain_read_as_w,noise_of_its_own,features_after_the_norm")
    rows = {row["prompt"]: row for row in report["rows"]}
    assert list(rows) == [
        "estimate", "clean at 0.0", "clean at 1.0", "noise_of_its_own", "target_gain_read_as_w",
        "clean in training, seed 0", "features_after_the_norm in training, seed 0"]
    assert rows["estimate"]["tau"] > 2
    assert rows["noise_of_its_own"]["temperature"] == 1.0
    for name, row in rows.items():
        assert row["seconds"] > 0
        assert row["cpu_seconds"] > 0
        if name == "target_gain_read_as_w":
            assert row["identical"] == 0
            (position, margin), = row["margins"]
            assert position == 0
            assert margin > 1
            assert row["identical_by_oracle"] == [0, 0]
        elif name != "estimate":
            assert row["identical"] == 1
            assert row["margins"] == []
    early, in_place, late = rows["clean at 0.0"]["right_at_shift"]
    assert in_place > 0.5 > max(early, late)
    clean, normed = [row for row in rows.values() if row["kind"] == "training"]
    assert clean["estimated_loss"] != normed["estimated_loss"]
    assert (tmp_path / "bugs.png").stat().st_size > 1000
    assert "`target_gain_read_as_w`" in (tmp_path / "bugs.md").read_text()


def test_bugs_resume_measures_only_what_is_missing(run_bench, monkeypatch):
    """An interrupted command that begins anew, or that leaves something out."""
    measured = []

    def keep(self, bug):
        measured.append(bug.name)
        if measured == ["clean", "causal_block"]:
            raise KeyboardInterrupt
        return row_of(bug.name, tau=2.0)

    monkeypatch.setattr(bugs.Trial, "of_decoding", keep)
    monkeypatch.setattr(bugs.Trial, "estimate_of_the_pair", lambda self: row_of_estimate(2.5))
    args = ("bugs", "--limit=1", "--only=causal_block")
    with pytest.raises(SystemExit, match="interrupted: .*--resume"):
        run_bench(*args)
    report = run_bench(*args, "--resume")
    assert measured == ["clean", "causal_block", "causal_block"]
    assert [row["prompt"] for row in report["rows"]] == ["estimate", "clean at 0.0", "causal_block"]


def test_bugs_unknown_name(run_bench):
    """A misspelt name measures nothing, without a word."""
    with pytest.raises(SystemExit, match="--only=leak is no bug: use decoding, training, or of"):
        run_bench("bugs", "--only=leak,causal_block")


@torch.no_grad()
def test_remembered_features_are_the_targets():
    """Features of another row, or of an earlier run with another target, in a short training."""
    target, _ = nano()
    tokens = tokens_of(2, 40)
    remembered = bugs.RememberedFeatures(target, {})
    for rows in (tokens, tokens.flip(0)):
        features, _ = target(rows, None, (1, 3), features_only=True)
        kept, nothing = remembered(rows, target_layer_ids=(1, 3), features_only=True)
        assert torch.allclose(kept, features, rtol=1e-4, atol=1e-5)
        assert nothing is None
    assert len(remembered.features) == 2
    assert remembered.head_weight is target.head_weight

# ------------------------------------------------------------------------------------------------
# tables


def row_of_estimate(tau):
    return {"kind": "estimate", "tau": tau}


def row_of(name, tau, identical=1.0, margins=(), **more):
    """A row of a report; its temperature is that of the greedy bugs, unless it is of training."""
    row = {"kind": "decoding", "bug": name, "temperature": 0.0, "dtype": "float32", "tau": tau,
           "identical": identical, "margins": margins, "accuracy": 0.5, "prompts": 4,
           "accepted_up_to_slot": [tau / 16] * 15, "right_at_shift": [0.02, tau / 16, 0.1]}
    return row | more


def row_of_training(name, seed, tau, estimate, **more):
    row = row_of(name, tau, kind="training", seed=seed, estimate=estimate, **more)
    del row["temperature"]
    return row


REPORT = {"rows": [
    row_of_estimate(9.0),
    row_of("clean", 8.0),
    row_of("causal_block", 4.0),
    row_of("rejected_state_kept", 8.0, 0.25, [[3, 0.5], [1, 2.0], [9, None]],
           identical_by_oracle=[1.0, 0.5]),
    row_of("conv_memory_kept", 8.0, 0.75, [[3, 0.001]]),     # rounding, as it were
    row_of("rope_theta_lost", 7.9),
    row_of("served_in_bf16", 8.0, 0.5, [[3, 0.2]], dtype="bfloat16"),
    row_of_training("clean", 0, 3.0, 4.0),
    row_of_training("clean", 1, 4.0, 5.0),
    row_of_training("labels_one_late", 0, 1.0, 4.0, right_at_shift=[0.02, 0.09, 0.5]),
    row_of_training("labels_one_late", 1, 2.0, 6.0, right_at_shift=[0.02, 0.09, 0.5]),
    row_of_training("whole_text_in_the_context", 0, 1.0, 14.0),
    row_of_training("whole_text_in_the_context", 1, 1.0, 14.0),
    row_of_training("random_cut", 0, 2.6, 3.0),
    row_of_training("random_cut", 1, 2.6, 4.0),
    row_of_training("uniform_slots", 0, 3.5, 1.0),
    row_of_training("uniform_slots", 1, 3.5, 1.0),
    row_of_training("anchor_in_the_context", 0, 2.8, 5.0),
    row_of_training("anchor_in_the_context", 1, 2.8, 5.0),
    row_of_training("blocks_see_one_another", 0, 1.8, 3.5),
    row_of_training("blocks_see_one_another", 1, 1.8, 3.5)]}


def test_bugs_stand_where_their_figures_put_them():
    """A bug in the wrong leaf of the decision tree; a drafter that is off by one and stands with
    those that are plainly bad; an order that is not that of the damage."""
    leaf_of = {}
    for summary in bugs_page.summaries(REPORT):
        leaf_of[summary.bug.name] = (summary.leaf, round(summary.left, 3))
    assert list(leaf_of.items()) == [
        ("rejected_state_kept", (bugs_page.WRONG_OUTPUT, 0.25)),
        ("whole_text_in_the_context", (bugs_page.BROKEN_PROMISE, round(1 / 3.5, 3))),
        ("labels_one_late", (bugs_page.SHIFTED, round(1.5 / 3.5, 3))),
        ("causal_block", (bugs_page.BROKEN_PROMISE, 0.5)),
        ("served_in_bf16", (bugs_page.NO_COST, 0.5)),
        ("blocks_see_one_another", (bugs_page.BROKEN_PROMISE, round(1.8 / 3.5, 3))),
        ("random_cut", (bugs_page.BOTH_LOW, round(2.6 / 3.5, 3))),
        ("conv_memory_kept", (bugs_page.NO_COST, 0.75)),
        ("anchor_in_the_context", (bugs_page.BROKEN_PROMISE, 0.8)),
        ("rope_theta_lost", (bugs_page.NO_COST, 0.988)),
        ("uniform_slots", (bugs_page.NO_COST, 1.0))]


def test_bugs_tables_by_hand():
    """Figures of another bug, or of its clean runs, in a row of a table."""
    lines = bugs_page.tables(REPORT).splitlines()
    assert ("| `rejected_state_kept` | 8.00 -> 8.00 | 0.50 / 0.50 / 0.50 / 0.50 | "
            "0.02 / 0.50 / 0.10 | 25% | 0.50 to 2.00 | wrong state | 50% | "
            "`test_cuts_rejected_block` |") in lines
    assert ("| `labels_one_late` | 3.50 -> 1.50 | 1.00 / 2.00 | 4.50 -> 5.00 | "
            "0.09 / 0.09 / 0.09 / 0.09 | 0.02 / 0.09 / 0.50 | 50% | "
            "`test_loss_and_gradients_equal_basic` |") in lines
    assert "| `rejected_state_kept` | 25% | 100% | 50% |" in lines
    lines = bugs_page.table_of_failures(REPORT).splitlines()
    assert lines[2:] == [
        "| 1 | `whole_text_in_the_context` 3.50 -> 1.00; `anchor_in_the_context` 3.50 -> 2.80 |",
        "| 2 | `labels_one_late` 3.50 -> 1.50; `causal_block` 8.00 -> 4.00; "
        "`blocks_see_one_another` 3.50 -> 1.80 |",
        "| 6 | `rejected_state_kept` 8.00 -> 8.00, and 75% of the outputs are wrong; "
        "`conv_memory_kept` 8.00 -> 8.00 |",
        "| 10 | `rope_theta_lost` 8.00 -> 7.90 |"]


@pytest.mark.parametrize("identical, margin, dtype, expected", (
    (True, None, "float32", exactness.EQUAL),
    (False, None, "float32", exactness.UNKNOWN),
    (False, 0.001, "float32", exactness.ROUNDING),
    (False, 0.16, "float32", exactness.WRONG),      # float32 does not round so far
    (False, 0.16, "bfloat16", exactness.ROUNDING),
    (False, 0.6, "bfloat16", exactness.WRONG)))
def test_bugs_verdict(identical, margin, dtype, expected):
    """Failures 5 and 6: rounding that is taken for a broken state, or the other way round."""
    assert exactness.verdict(identical, margin, dtype) == expected


def test_bugs_pages_have_the_figures_of_the_log():
    """Tables that were not made anew after the log was; a bug that docs/bugs.md does not tell."""
    with open(os.path.join(ROOT, "benchmarks", "results", "bugs_nano.json")) as f:
        report = json.load(f)
    pages = {"bugs.md": bugs_page.tables(report),
             "troubleshooting.md": bugs_page.table_of_failures(report)}
    for name, text in pages.items():
        with open(os.path.join(ROOT, "docs", name)) as f:
            page = f.read()
        assert f"{bugs_page.BEGIN}\n\n{text}\n\n{bugs_page.END}" in page, \
            f"docs/{name}: python bench.py figures"
        if name == "bugs.md":
            for bug in BUGS:
                assert f"\n- `{bug}`: " in page, bug
    assert {row.get("bug") for row in report["rows"]} >= BUGS.keys()


def test_bugs_rewrite_only_between_the_marks(tmp_path):
    """A page that is overwritten as a whole, or that grows with each run."""
    page = tmp_path / "page.md"
    page.write_text(f"before\n{bugs_page.BEGIN}\nold\n{bugs_page.END}\nafter\n")
    for _ in range(2):
        bugs_page.rewrite(str(page), "new")
        expected = f"before\n{bugs_page.BEGIN}\n\nnew\n\n{bugs_page.END}\nafter\n"
        assert page.read_text() == expected
    page.write_text("no marks")
    with pytest.raises(ValueError, match="has not once"):
        bugs_page.rewrite(str(page), "new")
    assert page.read_text() == "no marks"
