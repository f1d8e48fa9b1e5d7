"""The pictures: of a run that never was."""
import os

import bench
from benchmarks import figures
from benchmarks.prompts import load_prompts
from configurator import configure
from draft_decode import generate
from tests.common import ROOT, all_tokens, nano
from tokenizer import stop_ids


def test_figures_show_a_real_run(tmp_path, monkeypatch):
    """A picture of rounds whose tokens are not the target's answer to that prompt."""
    monkeypatch.chdir(ROOT)
    config = configure(vars(bench), [])
    logged = figures.read_report("acceptance_nano.json")["transcript"]
    target, tokenizer = nano()
    prompt = load_prompts(config, 200, target, tokenizer)[logged["prompt"]]
    assert logged["question"] == prompt.question
    answer = all_tokens(
        generate(target, None, prompt.ids, max_new_tokens=512, stop_token_ids=stop_ids(tokenizer)))
    pieces = [logged["first"]]
    for one_round in logged["rounds"]:
        assert one_round["anchor"] == pieces[-1]
        pieces += one_round["guesses"][:one_round["accepted"]]
        if one_round["own"] is not None:
            pieces.append(one_round["own"])
    assert "".join(pieces) == tokenizer.decode(answer)
    (tmp_path / "notes").write_text("mine")
    for name in ("bugs.png", "bugs.png.tmp"):  # a planted link directs a picture to another file
        (tmp_path / name).symlink_to(tmp_path / "notes")
    for path in figures.draw(tmp_path):
        assert os.path.getsize(path) > 1000
    assert (tmp_path / "notes").read_text() == "mine"
