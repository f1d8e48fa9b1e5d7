"""Data: samples on disk, the nano problems and target, conversations, the target's answers."""
import dataclasses
import filecmp
import functools
import gzip
import http.client
import io
import json
import os
import random
import re
import shutil
import time
import urllib.error
import urllib.request
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import draft_decode
import train
from benchmarks.prompts import load_questions
from tokenizer import chat_prompt, stop_ids, tokenizer_fingerprint
from checkpoint import load_target, random_target
from configurator import configure
from data import conversations, regenerate
from data.math240k import prepare as math240k
from data.math500 import prepare as math500
from data.nano import plain, pretrain, words
from data.nano import prepare as nano_prepare
from data.nano.problems import boxed, problem, problems, split_of
from data.nano.refusals import REFUSAL, REFUSED_EXAMPLES, normal_form, refused_text
from data.rows import Conversation, UnusableRow, read_rows
from data.samples import Samples, write_samples
from draft_decode import RoundOutput
from sampling import Sampling
from tests.common import (
    NANO_DRAFTER, NANO_TARGET, edit_json, nano, nano_copy, perturb, publish,
    questions, read_jsonl, small_config, write_jsonl)

TOKENIZER_FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]

# ------------------------------------------------------------------------------------------------
# samples on disk


def samples_in(folder, split, vocab_size=512):
    """The samples of a split as a list of (tokens, mask), both lists."""
    samples = Samples(str(folder), split, vocab_size)
    return [(tokens.tolist(), mask.tolist()) for tokens, mask in samples]


def test_samples_round_trip(tmp_path):
    """Ids above 65,535 wrap in uint16; the last valid id is refused; samples without a supervised
    token are kept."""
    first = ([1, 70_000, 248_319], [0, 1, 1])
    last = ([65_536], [1])
    splits = {"train": [first, ([5], [0]), last], "val": []}
    meta = write_samples(str(tmp_path), splits, {"vocab_size": 248_320})
    assert samples_in(tmp_path, "train", 248_320) == [first, last]
    assert meta["splits"]["train"] == {"rows": 2, "dropped": 1, "tokens": 4, "supervised": 3}


@pytest.mark.parametrize("split, vocab_size, hint", (
    ("train", 513, "512.*513"),
    ("val", 512, "no samples"),
    ("x", 512, "no samples"),
    ("train", 512, "5 tokens, meta.json says 4"),
    ("train", 512, "no meta.json"),
))
@pytest.mark.parametrize("folder, script", (
    ("rows", "rows/prepare.py"), ("wide" * 50, ".*wide/prepare.py"),
    ("long" * 50, "data/conversations.py --out_dir=.*long")))
def test_samples_of_another_target_or_run_are_refused(
        monkeypatch, tmp_path, split, vocab_size, hint, folder, script):
    """Training silently uses samples of a different vocabulary, an empty split, files that an
    interrupted run left behind, or an unfinished folder; the hint names the wrong script, or does
    not fit on a screen."""
    monkeypatch.chdir(tmp_path)
    splits = {"train": [([1, 2, 3, 4], [0, 1, 1, 1])], "val": []}
    write_samples(folder, splits, {"vocab_size": 512})
    if script.endswith("prepare.py"):
        (tmp_path / folder / "prepare.py").touch()
    if "5 tokens" in hint:
        with open(f"{folder}/train.tokens.bin", "ab") as f:
            f.write(b"1234")
    if "no meta.json" in hint:
        os.remove(f"{folder}/meta.json")  # it is written last
    with pytest.raises(ValueError, match=f"{hint}.*run python {script}") as refusal:
        Samples(folder, split, vocab_size)
    assert len(str(refusal.value)) < 200


@pytest.mark.parametrize("name, reason", (
    ("meta.json", "meta.json is broken"), ("train.tokens.bin", "cannot read the train rows"),
    ("train.mask.bin", "cannot read the train rows"), ("offsets", "offsets must ascend")))
def test_samples_in_broken_files_are_refused(tmp_path, name, reason):
    """A pipe with the name of our file is waited for forever; offsets that do not ascend give
    empty samples."""
    write_samples(str(tmp_path), {"train": [([1, 2], [0, 1])] * 3}, {"vocab_size": 512})
    if name == "offsets":
        np.array([0, 4, 2, 6], np.uint64).tofile(tmp_path / "train.offsets.bin")
    else:
        (tmp_path / name).unlink()
        os.mkfifo(tmp_path / name)
    with pytest.raises(ValueError, match=f"{reason}.*run python"):
        Samples(str(tmp_path), "train", 512)
    os.mkfifo(tmp_path / "rows.jsonl")
    with pytest.raises(ValueError, match="not a regular file"):
        list(read_rows(str(tmp_path)))


@pytest.mark.parametrize("token", (512, 600, -1))
def test_samples_outside_the_vocabulary_are_refused(tmp_path, token):
    """Ids of a different tokenizer reach the embedding and crash the GPU without a clear message; a
    failed run leaves a folder that looks finished."""
    write_samples(str(tmp_path), {"train": [([1, 2], [0, 1])]}, {"vocab_size": 512})
    splits = {"train": [([1, 2], [0, 1]), ([3, token], [0, 1])]}
    with pytest.raises(ValueError, match="sample 1 has token ids .*outside the vocabulary of 512"):
        write_samples(str(tmp_path), splits, {"vocab_size": 512})
    assert not (tmp_path / "meta.json").exists()

# ------------------------------------------------------------------------------------------------
# the nano task: problems, tokenizer, chat template, answers


def shipped_answers(split):
    """The nano target's answers, as rows {"split", "question", "answer"}."""
    with gzip.open(nano_prepare.answers, "rt") as f:
        return [row for row in map(json.loads, f) if row["split"] == split]


@pytest.mark.parametrize("task, refused", (
    ("words", 0), ("plain", 0), ("refusals", 1), ("target", 0.15), ("drafter", 0.10)))
def test_problems_are_disjoint(task, refused):
    """A question in two splits, a stream that depends on the run, a box that is not the answer; a
    task that is never trained or that crowds out the others; the two mixes exchanged."""
    counts = {"train": 1000, "val": 30, "test": 30}
    splits = {name: list(problems(name, count, task=task)) for name, count in counts.items()}
    asked = set()
    for name, rows in splits.items():
        for question, solution, answer in rows:
            asked.add(question)
            assert split_of(question) == name
            assert boxed(solution) == answer
            assert (answer is None) == (solution == REFUSAL)
    assert len(asked) == 1060
    assert list(problems("train", 10, start=990, task=task)) == splits["train"][990:]
    count = sum(answer is None for _, _, answer in splits["train"])
    assert count / 1000 == pytest.approx(refused, abs=0.03)


def test_problems_are_those_that_the_shipped_pair_was_trained_on():
    """Nobody can make the shipped pair again: a word or a number is drawn in another order, or a
    solution has another wording. The shipped target wrote nearly all solutions word for word."""
    solved = list(problems("val", 200, task="drafter"))
    rows = shipped_answers("val")
    assert [question for question, _, _ in solved] == [row["question"] for row in rows]
    same = [solution == row["answer"] for (_, solution, _), row in zip(solved, rows)]
    assert sum(same) >= 190
    first_problems = repr([problem(seed) for seed in range(6000)])
    checksum = zlib.crc32(first_problems.encode())
    assert checksum == 0x10FEDDA, "other problems than the shipped target was trained on"


@pytest.mark.parametrize("kind", (*words.KINDS, *plain.KINDS))
def test_solutions_are_right(kind):
    """An answer or a step that teaches wrong arithmetic."""
    for seed in range(500):
        _, steps, answer = kind(random.Random(seed))
        equations = re.findall(r"[0-9][-+*/ 0-9]*(?:= [-+*/ 0-9]+)+", "\n".join(steps))
        for equation in equations:
            values = {eval(side) for side in equation.split("=")}
            assert len(values) == 1, equation
        assert equations or kind is plain.equation
        last_number = re.findall("[0-9/]+", steps[-1].replace(" / ", "/"))[-1]
        assert kind is plain.division or str(answer).lstrip("-") == last_number


def test_refused_texts():
    """The target learns to refuse a held-out text or a question that it should answer; texts too
    long for the context; too few different texts."""
    texts = {refused_text(random.Random(seed)) for seed in range(5000)}
    assert len(texts) > 4000
    held_out = {normal_form(example) for example in REFUSED_EXAMPLES}
    assert held_out.isdisjoint(normal_form(text) for text in texts)
    assert all(text.strip() for text in texts)
    assert len(chat_prompt(nano()[1], max(texts, key=len))) < 300
    asked = {question for question, _, answer in problems("train", 9000) if answer is not None}
    assert not asked & texts


def test_boxed_answer_has_balanced_braces():
    """A fraction cut at its first brace, the first of two boxes, a box that never closes."""
    assert boxed(r"\boxed{1} \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("{1}") is None


def test_pretrain_makes_the_target_from_nothing(main, tmp_path):
    """Nobody can make the shipped tokenizer or a target of its shape again; merged digits, special
    tokens with other ids, text that decoding changes."""
    folder = str(tmp_path / "target")
    printed = main(pretrain, f"--out_dir={folder}", "--steps=1", "--batch_size=2")
    assert "2,992,488 parameters" in printed
    same, _, _ = filecmp.cmpfiles(NANO_TARGET, folder, TOKENIZER_FILES, shallow=False)
    assert same == TOKENIZER_FILES
    assert load_target(folder).config == nano()[0].config

    _, tokenizer = nano()
    assert len(tokenizer) == 507
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(special) == [502, 503, 504, 505, 506]
    assert len(tokenizer.encode("1234567890")) == 10
    for text in ("What is 12 * 34 ?\n\nSo 5.", "héé → 漢字 \t end", questions()[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_failure_9_fingerprint_sees_every_template_and_tokenizer(tmp_path):
    """Failure 9: the fingerprint misses a changed tokenizer or a template in tokenizer_config.json,
    which many public checkpoints have; or an unrelated key there changes it."""
    target = nano_copy(tmp_path / "target", "target")
    seen = [tokenizer_fingerprint(str(target))]
    edit_json(target / "tokenizer_config.json", padding_side="left")
    assert tokenizer_fingerprint(str(target)) == seen[0]
    edit_json(target / "tokenizer_config.json", chat_template="a template")
    seen.append(tokenizer_fingerprint(str(target)))
    (target / "chat_template.jinja").unlink()
    seen.append(tokenizer_fingerprint(str(target)))
    (target / "tokenizer.json").write_text("{}")
    assert tokenizer_fingerprint(str(target)) not in seen and len(set(seen)) == 3


def test_chat_prompt_has_the_empty_thought():
    """Failure 9: a drafter is trained with one template and served with a different one; a model
    family's end of text does not end an answer."""
    _, tokenizer = nano()
    opening = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n<think>\n"
    prompt = chat_prompt(tokenizer, "Hi 12")
    assert tokenizer.decode(prompt) == opening + "\n</think>\n\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 12", thinking=True)) == opening
    whole = tokenizer.apply_chat_template(turns("Hi 12", "34"), return_dict=False)
    assert whole == prompt + tokenizer.encode("34<|im_end|>\n")

    assert stop_ids(tokenizer) == {502, 504}
    vocabulary = {"a": 0, "</s>": 1, "<|endoftext|>": 3}
    assert stop_ids(SimpleNamespace(get_vocab=lambda: vocabulary, eos_token="</s>")) == {1, 3}
    assert stop_ids(SimpleNamespace(get_vocab=lambda: vocabulary, eos_token=None)) == {3}


def test_prepared_rows_begin_with_chat_prompt(main, tmp_path):
    """Failure 9: samples with a different template than decoding's; answers that are not the
    target's, shipped or new; the target is trained on its prompts."""
    _, tokenizer = nano()
    main(nano_prepare, "--fresh", "--train_rows=0", "--skip=0", "--val_rows=2",
         f"--answers={tmp_path}/answers.jsonl.gz", f"--out_dir={tmp_path}")
    for row, sample in zip(shipped_answers("val"), samples_in(tmp_path, "val")):
        prompt = chat_prompt(tokenizer, row["question"])
        reply = tokenizer.encode(row["answer"] + "<|im_end|>")
        assert sample == (prompt + reply, [0] * len(prompt) + [1] * len(reply))
        pretrained = pretrain.encode(tokenizer, row["question"], row["answer"])
        assert tuple(values.tolist() for values in pretrained) == sample

# ------------------------------------------------------------------------------------------------
# from conversations to samples


def turns(*texts):
    """A conversation that a user begins."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@functools.cache
def answered():
    """40 (question, answer) pairs of the nano target."""
    return [(row["question"], row["answer"]) for row in shipped_answers("train")[:40]]


def public_rows():
    """44 rows in the public form: good ones under both keys with extras of changing types, two that
    are dropped, and two special ones. tests/test_rows.py has more of the latter."""
    rows = []
    for i, pair in enumerate(answered()):
        key = "messages" if i % 2 else "conversations"
        rows.append({"extra": (None, 1, "x")[i % 3], key: turns(*pair)})
    return rows[:20] + [
        {"messages": turns("q", " ")},
        {"messages": turns("why " * 200, "late")},
        {"messages": turns("q", "<think>\n\n</think>\n\nempty thought, written out")},
        {"conversations": turns("What is 1 + 1?", "2", "And 2 + 2?", "It is 4.", "thanks")},
    ] + rows[20:]


@pytest.fixture
def make_samples(main, tmp_path):
    """make_samples(rows, *flags) runs a script, data/conversations.py by default, over rows that it
    writes as JSON lines. It returns what was printed, and the folder."""
    def call(rows, *flags, folder="samples", script=conversations):
        source = write_jsonl(tmp_path / "source.jsonl", rows)
        printed = main(
            script, f"--source={source}", f"--target={NANO_TARGET}",
            f"--out_dir={tmp_path / folder}", "--num_proc=1", "--max_length=160", *flags)
        return printed, tmp_path / folder
    return call


def read_both(folder):
    """The samples of both splits, the held-out ones first."""
    return samples_in(folder, "val") + samples_in(folder, "train")


def masked_text(tokens, mask):
    """The text of the supervised tokens."""
    _, tokenizer = nano()
    supervised = [token for token, is_supervised in zip(tokens, mask) if is_supervised]
    return tokenizer.decode(supervised)


def test_failure_9_samples_begin_with_chat_prompt(make_samples):
    """Failure 9: acceptance falls from 60 to 25 % because samples have a different template than
    decoding; the header or the empty thought is supervised; the closing <|im_end|> or an earlier
    answer is not supervised. Rows are lost silently; val_rows is ignored."""
    printed, folder = make_samples(public_rows(), "--val_rows=1")
    _, tokenizer = nano()
    mask_of = {tuple(tokens): mask for tokens, mask in read_both(folder)}
    # an empty thought in an answer is the template's own
    for question, answer in answered() + [("q", "empty thought, written out")]:
        prompt = chat_prompt(tokenizer, question)
        reply = tokenizer.encode(answer + "<|im_end|>")
        assert mask_of.pop(tuple(prompt + reply)) == [0] * len(prompt) + [1] * len(reply)

    # several turns: text after the last answer is dropped, and both answers are supervised
    prompt = chat_prompt(tokenizer, turns("What is 1 + 1?", "2", "And 2 + 2?"))
    tokens = prompt + tokenizer.encode("It is 4.<|im_end|>")
    assert masked_text(tokens, mask_of.pop(tuple(tokens))) == "2<|im_end|>It is 4.<|im_end|>"
    assert not mask_of

    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dropped"] == {"an empty answer": 1, "no answer within 160 tokens": 1}
    assert (meta["read"], meta["splits"]["val"]["rows"], meta["cut"]) == (44, 1, 0)
    assert "44 rows read, 42 kept" in printed and "2 dropped" in printed


def test_prepare_cuts_at_max_length():
    """A row of exactly max_length tokens counts as cut; a row without an answer token is kept."""
    def encode(max_length):
        return conversations.encode(Conversation(turns("q", "ab")), NANO_TARGET, False, max_length)

    whole = encode(3072)
    prompt_length = whole.mask.argmax()
    assert not encode(len(whole.tokens)).was_cut
    assert encode(prompt_length + 1).was_cut
    assert encode(prompt_length + 1).mask.tolist() == [0] * prompt_length + [1]
    with pytest.raises(UnusableRow, match="no answer within"):
        encode(prompt_length)


def test_prepare_is_the_same_at_every_run(make_samples, tmp_path):
    """A run depends on the number of processes or on the form or order of its source; more than a
    tenth of all rows is held out."""
    _, folder = make_samples(public_rows())
    assert len(samples_in(folder, "val")) == 4
    make_samples(public_rows(), "--num_proc=2", folder="processes")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "processes" / path.name).read_bytes(), path.name
    _, reversed_folder = make_samples(public_rows()[::-1], folder="reversed")
    assert sorted(samples_in(reversed_folder, "val")) == sorted(samples_in(folder, "val"))

    many = tmp_path / "many"
    many.mkdir()
    write_jsonl(many / "a.jsonl", [{"messages": turns(*pair)} for pair in answered()[:20]])
    write_jsonl(many / "b.jsonl", public_rows()[20:] + [""])
    (many / "dataset_infos.json").write_text("{}")
    _, mixed = make_samples([], f"--source={many}", folder="mixed")
    assert read_both(mixed) == read_both(folder)


def test_phase_1_2_end_to_end_on_small_stand_ins(make_samples, main, monkeypatch, tmp_path):
    """A key, a shape, or a file name that fails only on the real machine. The recipe of the real
    run trains for a narrow target of 24 layers, with all files in the public form. The script that
    train.py runs for its data has different settings, or its settings win over the flags."""
    target = tmp_path / "Qwen3.5-0.8B"
    config = dataclasses.replace(
        small_config(), vocab_size=512, num_hidden_layers=24, layer_types=(), eos_token_id=504)
    publish(target, perturb(random_target(config, "cpu", torch.float32), scale=5.0))
    for name in TOKENIZER_FILES:
        shutil.copy(os.path.join(NANO_TARGET, name), target)
    printed, data = make_samples(public_rows(), script=math240k)
    assert "source = 'Moonlight556/qwen3.5-0.8b-target-matched-math-240k'" in printed
    assert "target = 'Qwen/Qwen3.5-0.8B'" in printed
    assert f"out_dir = '{os.path.dirname(math240k.__file__)}'" in printed

    run = tmp_path / "run-dflash"
    monkeypatch.setattr(train, "DECODE_TOKENS", 4)
    printed = main(
        train, "config/phase1_2.py", f"--target={target}", f"--data={data}", f"--out_dir={run}",
        "--device=cpu", "--dtype=float32", "--num_anchors=8", "--num_heads=2", "--head_dim=32",
        "--intermediate_size=96", "--lr=5e-3", "--epochs=0.4", "--log_every=1",
        "--decode_prompts=1")
    assert "held-out tau from real decoding" in printed
    losses = [entry["loss"] for entry in read_jsonl(run / "log.jsonl") if entry["kind"] == "train"]
    assert losses[-1] < losses[0], printed
    config_file, = run.glob("step-*/config.json")
    assert json.loads(config_file.read_text())["dflash_config"] == {
        "block_size": 16, "mask_token_id": 507, "target_layer_ids": [3, 7, 11, 15, 19]}

    printed = main(
        draft_decode, f"--target={target}", f"--drafter={run}", "--prompt=What",
        "--max_new_tokens=4", "--device=cpu", "--dtype=float32")
    assert "identical" in printed.splitlines()[-1]


def test_math500_prompts(main, tmp_path):
    """A different suffix than the published figures were measured with."""
    row = {"problem": "What is $1+1$?", "answer": "2", "level": 1}
    source = write_jsonl(tmp_path / "test.jsonl", [row])
    out = tmp_path / "new" / "prompts.jsonl"
    assert "1 prompts" in main(math500, f"--source={source}", f"--out={out}")
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    assert load_questions(str(out), 5) == [("What is $1+1$?" + suffix, "2")]

# ------------------------------------------------------------------------------------------------
# answers of the target itself


def regenerate_config(**values):
    """The keys of data/regenerate.py for the nano target, with some values replaced."""
    keys = {"target": NANO_TARGET, "device": "cpu", "dtype": "float32"} | values
    return SimpleNamespace(**vars(configure(vars(regenerate), [])) | keys)


def test_regenerate_sends_its_keys_until_it_has_an_answer(monkeypatch):
    """A server that breaks a connection or is busy loses a prompt; a key does not reach it."""
    reply = {"choices": [{"message": {"content": "a"}, "finish_reason": "stop"}]}
    busy = urllib.error.HTTPError("http://x", 503, "", {}, io.BytesIO(b"busy"))
    replies = [http.client.RemoteDisconnected("gone"), busy, json.dumps(reply).encode()]
    sent = []

    def urlopen(request, timeout):
        sent.append(json.loads(request.data))
        reply = replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return io.BytesIO(reply)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = regenerate_config(
        server="http://x", model="m", temperature=0.7, thinking=True, max_new_tokens=160)
    answer, = regenerate.ask_all(config, {3: (turns("q"), None)})
    assert answer == (3, regenerate.Answer({"role": "assistant", "content": "a"}))
    assert sent == 3 * [
        {"model": "m", "messages": turns("q"), "temperature": 0.7, "max_tokens": 160,
         "chat_template_kwargs": {"enable_thinking": True}}]


@pytest.mark.parametrize("status, result", (
    (400, "refused: 400 no"), (500, "refused: 500 no"), (429, None), (503, None)))
def test_regenerate_stops_if_a_server_is_away(monkeypatch, status, result):
    """A server that restarts for a minute refuses all prompts for good; a prompt that a server
    refuses stops the run."""
    monkeypatch.setattr(regenerate, "send", lambda request, seconds: (status, b"no"))
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    config = regenerate_config(server="http://x", model="m")
    if result:
        assert regenerate.ask(config, turns("q"), None) == regenerate.Answer(None, result)
    else:
        with pytest.raises(ValueError, match=f"gave no answer in 7 tries .{status} no"):
            regenerate.ask(config, turns("q"), None)


def test_regenerate_drops_an_answer_that_changes_as_text():
    """Training sees other tokens than the target wrote."""
    tokenizer = SimpleNamespace(decode=lambda tokens: "ab", encode=lambda text: [1])
    assert regenerate.text_answer(tokenizer, [1, 7], {7}).message["content"] == "ab"
    assert regenerate.text_answer(tokenizer, [5, 7], {7}).why_none == "does not survive as text"


@pytest.mark.parametrize("server, flag, hint", (
    ("", "--retries=2", "1 answered"),
    ("", "--max_new_tokens=9", "1 did not end"),
    ("", "--model=other", "refused: 400"),
    ("http://127.0.0.1:9/v1", "--retries=2", "gave no answer in 3 tries"),
))
def test_regenerate_against_a_server(main, monkeypatch, served, tmp_path, server, flag, hint):
    """Answers with a different template, or one that reached the limit counts as finished; a run
    waits for hours on a server that refuses or is not there; a finished file is overwritten."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    question, answer = answered()[0]
    source = write_jsonl(tmp_path / "prompts.jsonl", [{"id": "x", "question": question}])
    out = tmp_path / "all.jsonl"
    args = (f"--prompts={source}", f"--server={server or served}", f"--model={NANO_TARGET}",
            f"--out={out}", "--max_new_tokens=160", flag)
    assert hint in main(regenerate, *args)
    if hint == "1 answered":
        messages = turns(question, answer)
        assert read_jsonl(out) == [{"id": "x", "messages": messages, "target_turns": [1]}]
        assert "is there already" in main(regenerate, *args)


@pytest.mark.parametrize("temperature, drafter, tokens_per_forward", (
    (0.0, "", 1), (0.7, NANO_DRAFTER, 16)))
def test_regenerate_decodes_with_its_keys(monkeypatch, temperature, drafter, tokens_per_forward):
    """A key does not reach the decoder; an answer without an end is kept, or an answer goes to a
    different prompt; rows share their noise."""
    calls = []

    def fake_generate_many(target, drafter, prompts, **keys):
        calls.append(keys | {"dtype": target.embed_tokens.weight.dtype})
        # the last prompt ends first; the answer to p has no end
        for index, prompt in reversed(list(enumerate(prompts))):
            yield index, RoundOutput([65], 0)
            is_p = prompt == chat_prompt(tokenizer, turns("p"), thinking=True)
            yield index, RoundOutput([66 if is_p else 504], 0, is_last=True)

    monkeypatch.setattr(regenerate, "generate_many", fake_generate_many)
    config = regenerate_config(drafter=drafter, temperature=temperature, thinking=True, slots=2,
                               max_new_tokens=9, dtype="bfloat16")
    _, tokenizer = nano()
    texts = {4: "q", 6: "p", 7: "9 " * 1100, 9: "q"}
    waiting = {number: (turns(text), None) for number, text in texts.items()}
    (refused, reason), *answers = regenerate.decode_here(config, waiting)
    assert refused == 7 and reason.why_none.startswith("refused")
    whole = regenerate.Answer({"role": "assistant", "content": tokenizer.decode([65])})
    expected = {4: whole, 6: regenerate.Answer(None, "did not end"), 9: whole}
    assert dict(answers) == expected
    assert calls == [{
        "max_new_tokens": 9, "stop_token_ids": {502, 504}, "slots": 2, "dtype": torch.bfloat16,
        "tokens_per_forward": tokens_per_forward, "sampling": Sampling(temperature),
        "sequence_ids": [4, 6, 9]}]


def test_regenerate_resumes(main, monkeypatch, tmp_path):
    """An answer is lost, asked for again, or moved by an interruption; answers to different prompts
    or with different settings are kept."""
    prompts = write_jsonl(tmp_path / "prompts.jsonl", [{"problem": f"q{i}"} for i in range(5)])
    out = tmp_path / "answers.jsonl"
    args = (f"--prompts={prompts}", f"--target={NANO_TARGET}", f"--out={out}")
    asked = []

    def decode_here(config, waiting):
        """The last prompt ends first. The first run is interrupted after two answers, the second
        one after one more."""
        asked.append(set(waiting))
        for number in sorted(waiting, reverse=True):
            if number == 3 - len(asked) > 0:
                raise KeyboardInterrupt
            answer = regenerate.Answer({"role": "assistant", "content": f"a{number}"})
            yield number, answer if number else regenerate.Answer(None, "did not end")

    monkeypatch.setattr(regenerate, "decode_here", decode_here)
    assert "interrupted" in main(regenerate, *args)
    header, *some = read_jsonl(f"{out}.part")
    other_prompt = some[0] | {"prompt": 0}
    for content in ([header, other_prompt], [header, {}], [header, 7], [header | {"model": "m"}]):
        write_jsonl(f"{out}.part", content)
        assert "in another way" in main(regenerate, *args)
    write_jsonl(f"{out}.part", [header, *some, {"half": "a line"}])
    os.truncate(f"{out}.part", os.path.getsize(f"{out}.part") - 9)
    assert "interrupted" in main(regenerate, *args)
    assert "4 answered, 1 did not end" in main(regenerate, *args)
    assert asked == [{0, 1, 2, 3, 4}, {0, 1, 2}, {0, 1}]
    assert read_jsonl(out) == [
        {"id": str(i), "messages": turns(f"q{i}", f"a{i}"), "target_turns": [1]}
        for i in range(1, 5)]
    assert not os.path.exists(f"{out}.part")
