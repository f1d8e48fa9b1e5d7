"""The pictures: of a run that never was, or in other times than the logged ones."""
import os

import pytest

import bench
from benchmarks import animation, figures
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
    in_rounds = sum([one_round["texts"] for one_round in logged["rounds"]], [logged["first"]])
    in_steps = [logged["first"]] + [step["text"] for step in logged["steps"]]
    assert in_rounds == in_steps
    assert "".join(in_steps) == tokenizer.decode(answer, skip_special_tokens=True)
    assert len(in_steps) == len(answer)

    for path in figures.draw(tmp_path):
        assert os.path.getsize(path) > 1000


def test_animation_keeps_the_logged_times(tmp_path):
    """Failure 15: halves that do not end at their logged times, in their true ratio."""
    from PIL import Image
    rounds = [{"texts": ["b", "c", "d"], "accepted": 2, "own": "d", "seconds": 0.04}]
    steps = [{"text": text, "seconds": 0.04} for text in "bcd"]
    logged = {"question": "?", "first": "a", "rounds": rounds, "steps": steps}
    report = {"transcript": logged, "setup": {"target": "T", "device": "cpu", "dtype": "float32"}}
    animation.decoding(str(tmp_path / "a.gif"), report, slowdown=20)
    pieces = animation.pieces_of(rounds[0])
    assert pieces == [("b", animation.GREEN), ("c", animation.GREEN), ("d", animation.BLUE)]

    # each half changes when a forward of 40 ms ends, 20 times slower
    changes = {"left": [], "right": []}
    texts = {}
    with Image.open(tmp_path / "a.gif") as gif:
        milliseconds = 0
        for number in range(gif.n_frames):
            gif.seek(number)
            frame = gif.convert("RGB")
            for half, left in (("left", 0), ("right", animation.COLUMN)):
                top = animation.ANSWER
                text = frame.crop((left, top, left + animation.COLUMN, top + 40)).tobytes()
                if text != texts.get(half, text):
                    changes[half].append(milliseconds)
                texts[half] = text
            milliseconds += gif.info["duration"]
    assert changes["left"] == pytest.approx([800, 1600, 2400], abs=animation.FRAME_MS)
    assert changes["right"] == pytest.approx([800], abs=animation.FRAME_MS)
    assert milliseconds >= 2400 + animation.PAUSE_MS
