"""docs/round.html: a page that shows a run that never was, or that is older than the code."""
import json
import os
import re

import pytest

from benchmarks import page
from tests.common import ROOT


@pytest.fixture
def committed(monkeypatch):
    """(text, recording, times) of the committed page."""
    monkeypatch.chdir(ROOT)
    with open(page.PAGE, encoding="utf-8") as f:
        text = f.read()
    scripts = re.findall(r'<script type="application/json".*?>(.*?)</script>', text)
    recording, times = map(json.loads, scripts)
    return text, recording, times


def without_percent(recording):
    """The recording, and apart from it the drafter's probabilities, which rounding can change."""
    percent = []
    for run in recording["runs"].values():
        percent += [one_round.pop("percent") for one_round in run["rounds"]]
    return recording, sum(percent, [])


def test_page_shows_what_decoding_gives_today(committed):
    """Tokens, guesses, or positions of older code or other weights; a page that was not written
    again after a change of the template; a bug that is off, or on in the clean run."""
    text, recording, times = committed
    assert page.fill_template(recording, times) == text, "run python bench.py page"
    rounds = {name: len(run["rounds"]) for name, run in recording["runs"].items()}
    assert rounds == {name: len(times[name]) for name in rounds}
    assert len(times["target alone"]) == len(recording["runs"]["clean"]["tokens"]) - 1

    workload = page.shipped_pair()
    recorded, recorded_percent = without_percent(recording)
    today, percent = without_percent(page.record(workload))
    assert recorded == today, "run python bench.py page"
    assert percent == pytest.approx(recorded_percent, abs=1)

    clean, *with_bug = today["runs"].values()
    alone = page.generate(workload.target, None, today["prompt"], stop_token_ids=workload.stops)
    assert clean["tokens"] == page.collect(alone).tokens
    assert all(run["rounds"] != clean["rounds"] for run in with_bug)


def test_page_needs_nothing_else(committed):
    """A page that loads something, which fails offline, or that a token's text breaks."""
    text, _, _ = committed
    assert os.path.getsize(page.PAGE) <= 300_000
    assert not re.search(r"https?:|//\w|src=|@import|url\(|innerHTML", text)
    assert re.findall(r'href="(.*?)"', text) == ["data:,"]
    filled = page.fill_template({"texts": ["</script><b>\u2028\x00"]}, {})
    assert "</script><b>" not in filled
    assert "\u2028" not in filled and "\x00" not in filled
