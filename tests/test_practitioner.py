"""
The path of a practitioner who has a fine-tuned target and chats: let the target answer the chats,
make samples, train a drafter, decode with it, and measure it on the same chats.
"""
import filecmp
import json
import os
import random
import re
import shlex
import shutil

from safetensors import safe_open

import bench
import draft_decode
import train
from checkpoint import load_drafter, load_target
from data import conversations, regenerate
from data.nano.problems import problems
from data.samples import Samples
from tests.common import NANO_TARGET, ROOT, nano, publish, read_jsonl, write_jsonl
from tests.test_data import masked_text, turns
from tests.test_rows import QWEN, tool_row
from tokenizer import tokenizer_fingerprint

SOMEONE = "An answer of someone else."
END = "<|im_end|>"
CPU = ("--device=cpu", "--dtype=float32")
BAD_ROWS = {  # why a row is dropped: the row
    "text that is not Unicode: a lone surrogate": {"question": "\ud800"},
    "not JSON": '{"question": "What is 3',
    "an unknown role, 'banana'": {"messages": [{"role": "banana", "content": "b"}]},
    "images, which the target cannot read": {"messages": turns("q", "a"), "images": ["x"]},
    "refused: a special token in the text: <|im_start|>": {"messages": turns("<|im_start|>", "a")},
}


def chats():
    """200 rows of all kinds in random order."""
    solved = problems("train", 2000, task="plain")
    questions = (question for question, solution, _ in solved if len(solution) < 52)
    rows = [row for row in BAD_ROWS.values() for _ in range(2)]
    for _ in range(90):
        rows.append({"question": next(questions), "answer": SOMEONE})
    for _ in range(20):  # two system prompts for one question
        asked = turns(next(questions), SOMEONE)
        for style in ("Be brief.", "Be kind."):
            rows.append({"messages": [{"role": "system", "content": style}, *asked]})
    for _ in range(10):  # the assistant begins, and it thinks
        talk = turns(next(questions), SOMEONE, next(questions), SOMEONE)
        talk[1]["reasoning_content"] = talk[3]["reasoning_content"] = "Hm."
        rows.append({"messages": [{"role": "assistant", "content": "Hello!"}, *talk]})
        rows.append(tool_row())
        rows[-1]["messages"][0]["content"] = next(questions)
    for _ in range(20):
        pair = [{"from": "human", "value": next(questions)}, {"from": "gpt", "value": SOMEONE}]
        rows.append({"conversations": pair})
    for _ in range(10):
        rows.append({"prompt": turns(next(questions))})
        rows.append({"messages": json.dumps(turns(next(questions), SOMEONE))})
    random.Random(158).shuffle(rows)  # the first four are of four kinds
    return rows


def supervised_texts(folder, target, split):
    """(the supervised text of each sample, the first questions of all samples)."""
    samples = Samples(folder, split, 512, tokenizer_fingerprint(target))
    texts = [nano()[1].decode(tokens) for tokens, _ in samples]
    questions = {re.search(r"user\n(.*?)<\|im_end\|>", text, re.DOTALL)[1] for text in texts}
    return [masked_text(tokens, mask) for tokens, mask in samples], questions


def own_answers(row):
    return [row["messages"][turn]["content"] for turn in row["target_turns"]]


def test_practitioners_path(main, tmp_path):
    """A command does not take what the command before it has written; rows are lost or kept without
    a word; someone else's answers are trained on; a printed command cannot be pasted."""
    work = tmp_path / "my files"
    work.mkdir()
    target = work / "fine-tuned target"
    answers = work / "answers.jsonl"
    samples = str(work / "samples")
    out_dir = work / "tiny-dflash"

    # the shipped target in the form in which Qwen3.5 is published, with a template like Qwen3.5's
    publish(target, load_target(NANO_TARGET), shards=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(os.path.join(NANO_TARGET, name), target)
    (target / "chat_template.jinja").write_text(QWEN)

    # it answers the chats: every row is answered or reported
    rows = chats()
    assert len(rows) == 200
    source = write_jsonl(work / "chats.jsonl", rows)
    printed = main(regenerate, f"--prompts={source}", f"--out={answers}", f"--target={target}",
                   "--max_new_tokens=40", *CPU)
    for reason, bad in BAD_ROWS.items():
        first, second = [number for number, row in enumerate(rows, 1) if row == bad]
        line = f"dropped 2: {reason} (line {first}, {second})"
        if reason.startswith("refused"):  # when the target is there
            line = f"2 {reason}"
        assert line in printed
    answered = read_jsonl(answers)
    count = sum(len(own_answers(row)) for row in answered)
    assert f"answers.jsonl: {count} answered, 2 refused" in printed
    assert len(answered) > 170  # the others were too long
    assert SOMEONE not in answers.read_text()
    kinds = [[message["role"] for message in row["messages"]] for row in answered]
    assert ["system", "user", "assistant"] in kinds
    assert ["user", "assistant", "tool", "assistant"] in kinds
    assert ["assistant", "user", "assistant", "user", "assistant"] in kinds

    # samples: all rows are kept, and only what the target wrote is supervised
    main(conversations, f"--source={answers}", f"--target={target}", f"--out_dir={samples}",
         "--max_length=512", "--num_proc=1")
    meta = json.loads((work / "samples" / "meta.json").read_text())
    assert (meta["read"], meta["dropped"], meta["unmarked"]) == (len(answered), {}, 0)
    held_out, held_out_questions = supervised_texts(samples, str(target), "val")
    trained_on, questions = supervised_texts(samples, str(target), "train")
    assert not questions & held_out_questions  # with two system prompts too
    assert len(answered) // 20 < len(held_out) <= len(answered) // 10
    for row in answered:
        own = [answer + END for answer in own_answers(row)]
        question = next(m["content"] for m in row["messages"] if m["role"] == "user")
        if question in held_out_questions:
            held_out.remove(own[-1])
        else:
            trained_on.remove("".join(own))
    assert held_out == trained_on == []

    # a drafter
    printed = main(
        train, f"--target={target}", f"--data={samples}", f"--out_dir={out_dir}", "--num_layers=1",
        "--num_heads=2", "--num_kv_heads=1", "--head_dim=32", "--intermediate_size=64",
        "--target_layer_ids=3,7", "--num_anchors=16", "--max_length=512", "--epochs=0.2",
        "--pad_to_multiple_of=64", "--lr=1e-2", "--log_every=1", "--decode_prompts=2", *CPU)
    losses = [entry["loss"] for entry in read_jsonl(out_dir / "log.jsonl")]
    assert losses[-1] < losses[0]
    assert "(2 prompts)" in printed
    lines = [line.split(": ", 1) for line in printed.splitlines()[-4:]]
    commands = {name: shlex.split(command) for name, command in lines}
    folder, = out_dir.glob("step-*")

    # what it exports
    drafter = load_drafter(str(folder), nano()[0].config)
    assert drafter.block_size == 16 and drafter.target_layer_ids == (3, 7)
    assert filecmp.cmp(folder / "dflash.py", os.path.join(ROOT, "model.py"), shallow=False)
    with safe_open(folder / "model.safetensors", "pt") as f:
        assert len(f.keys()) == 3 + 11

    # the printed commands, with a question and small sizes
    assert {str(target), str(folder)} <= set(commands["SGLang"])
    assert json.loads(commands["vLLM"][-1])["model"] == str(folder)
    python, script, *flags, question = commands["decode"]
    assert (python, script, question) == ("python", "draft_decode.py", "--prompt=...")
    printed = main(draft_decode, *flags, "--prompt=30 * 3", "--max_new_tokens=40", *CPU)
    assert printed.endswith("identical\n")
    python, script, *flags = commands["measure"]
    assert (python, script, flags[-1]) == ("python", "bench.py", f"--prompts={answers}")
    printed = main(bench, *flags, "--limit=4", "--max_new_tokens=40", f"--out_dir={work}", *CPU)
    report = json.loads(printed.splitlines()[-1])
    assert (report["prompts"], report["identical"]) == (4, 1)

    # the prompts were the same in all commands, because the last answers are
    measured = read_jsonl(work / "acceptance.jsonl")
    texts = [nano()[1].decode(row["speculative"]["tokens"]) for row in measured]
    assert texts == [own_answers(row)[-1] + END for row in answered[:4]]
