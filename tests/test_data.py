"""Data: rows on disk, the nano problems, tokenizer and chat template, conversations to rows,
answers of the target itself."""
import dataclasses
import functools
import http.server
import json
import os
import random
import re
import shutil
import statistics
import threading
import time
import urllib.request
from fractions import Fraction
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch
from safetensors import safe_open

from benchmarks.prompts import load_questions
from tokenizer import chat_prompt, load_tokenizer, stop_ids, tokenizer_fingerprint
from checkpoint import random_target, read_target_config
from configurator import configure
from data import conversations, regenerate
from data.math240k import prepare as math240k
from data.math500 import prepare as math500
from data.nano import make_tokenizer, plain, pretrain
from data.nano import prepare as nano_prepare
from data.nano.problems import boxed, problem, problems, split_of
from data.nano.refusals import REFUSAL, REFUSED_EXAMPLES, normal_form, refused_text
from data.samples import Samples, write_samples
from draft_decode import RoundOutput, generate
from sampling import Sampling
from tests.common import (
    NANO, NANO_DRAFTER, NANO_TARGET, all_tokens, edit_json, nano, nano_copy, perturb, publish,
    questions, read_jsonl, small_config, write_jsonl)

# ------------------------------------------------------------------------------------------------
# rows on disk


def as_lists(rows):
    """Rows as a list of (tokens, mask), both lists."""
    result = []
    for i in range(len(rows)):
        tokens, mask = rows[i]
        result.append((tokens.tolist(), mask.tolist()))
    return result


def test_rows_round_trip(tmp_path):
    """Ids above 65,535 wrap in uint16; rows without a supervised token train on nothing."""
    folder = str(tmp_path)
    first = ([1, 70_000, 248_319], [0, 1, 1])
    unsupervised = ([5], [0])
    last = ([65_536], [1])
    splits = {"train": [first, unsupervised, last], "val": []}
    meta = write_samples(folder, splits, {"vocab_size": 248_320})
    assert as_lists(Samples(folder, "train", 248_320)) == [first, last]
    assert meta["splits"]["train"] == {"rows": 2, "dropped": 1, "tokens": 4, "supervised": 3}


@pytest.mark.parametrize("split, vocab_size, hint", (
    ("train", 512, "248320.*512"),
    ("val", 248_320, "no rows"),
    ("x", 248_320, "no rows"),
))
def test_rows_of_another_target_are_refused(tmp_path, split, vocab_size, hint):
    """Rows of another vocabulary, or none at all, that train without a word."""
    splits = {"train": [([1, 2], [0, 1])], "val": []}
    write_samples(str(tmp_path), splits, {"vocab_size": 248_320})
    with pytest.raises(ValueError, match=hint + ".*run python.*data/conversations.py"):
        Samples(str(tmp_path), split, vocab_size)


def test_rows_of_another_size_are_refused(tmp_path):
    """Files that an interrupted or a second run left behind, read as if they were whole."""
    folder = str(tmp_path)
    write_samples(folder, {"train": [([1, 2, 3, 4], [0, 1, 1, 1])]}, {"vocab_size": 512})
    with open(tmp_path / "train.tokens.bin", "ab") as f:
        f.write(b"1234")
    with pytest.raises(ValueError, match="5 tokens, meta.json says 4"):
        Samples(folder, "train", 512)
    # meta.json is written last, so without it the folder counts as unfinished
    (tmp_path / "meta.json").unlink()
    with pytest.raises(ValueError, match="no meta.json.*data/conversations.py"):
        Samples(folder, "train", 512)
    # a folder with a script of its own is made by that
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ValueError, match=f"run python {folder}/prepare.py"):
        Samples(folder, "train", 512)


def test_rows_outside_the_vocabulary_are_refused(tmp_path):
    """Ids of another tokenizer reach the embedding: a crash of the device that names nothing."""
    rows = [([1, 2], [0, 1]), ([3, 600], [0, 1])]
    hint = r"row 1 has token ids 3..600, outside the vocabulary of 512"
    with pytest.raises(ValueError, match=hint):
        write_samples(str(tmp_path), {"train": rows}, {"vocab_size": 512})
    assert not (tmp_path / "meta.json").exists()


@pytest.mark.parametrize("vocab_size, is_inside", ((512, False), (513, True)))
def test_rows_at_the_edge_of_the_vocabulary(tmp_path, vocab_size, is_inside):
    """An id that equals the size of the vocabulary, one more than its last row, is taken for one
    of it; or the last row is refused."""
    splits = {"train": [([0, 512], [0, 1])]}
    if is_inside:
        write_samples(str(tmp_path), splits, {"vocab_size": vocab_size})
        return
    with pytest.raises(ValueError, match=r"token ids 0..512, outside the vocabulary of 512"):
        write_samples(str(tmp_path), splits, {"vocab_size": vocab_size})

# ------------------------------------------------------------------------------------------------
# the nano task: problems, tokenizer, chat template, answers


@pytest.mark.parametrize("task", ("words", "plain", "refusals", "target", "drafter"))
def test_problems_are_disjoint(task):
    """A question in two splits, another stream at every run, a box that is not the answer."""
    splits = {name: list(problems(name, 60, task=task)) for name in ("train", "val", "test")}
    asked = set()
    for name, rows in splits.items():
        for question, solution, answer in rows:
            asked.add(question)
            assert split_of(question) == name
            assert boxed(solution) == answer
            assert (answer is None) == (solution == REFUSAL)
    assert len(asked) == 180
    assert list(problems("train", 10, start=50, task=task)) == splits["train"][50:]
    assert problem(7, task) == problem(7, task)


@pytest.mark.parametrize("mix, share", (("target", 0.15), ("drafter", 0.10)))
def test_mix_has_all_tasks(mix, share):
    """A task that is never trained, or that crowds out the others; the mixes exchanged."""
    rows = list(problems("train", 2000, task=mix))
    refused = sum(answer is None for _, _, answer in rows)
    assert refused / 2000 == pytest.approx(share, abs=0.03)
    with pytest.raises(ValueError, match="use one of words, plain, refusals, tok"):
        next(problems("train", 1, task="nano"))


def test_word_problems_are_right():
    """A step that teaches a wrong sum."""
    for seed in range(3000):
        _, solution, _ = problem(seed, "words")
        check_sums(solution)


def check_sums(solution):
    """Every "a + b = c" of two whole numbers is right, and there is one."""
    sums = re.findall(r"(?<![-+*/] )\b(\d+ [-+*/] \d+) = (\d+)\b(?! [-+*/=])", solution)
    assert sums, solution
    for left, right in sums:
        assert eval(left) == int(right), solution


SIGNS = {  # of a calculation, and the words that stand for it
    "+": ("+", "plus", "add", "sum", "together"),
    "-": ("-", "−", "minus", "subtract", "difference", "take", "less"),
    "*": ("*", "x", "×", "times", "multipl", "product"),
    "/": ("/", "÷", "divide", "quotient", "go into", "over"),
}


@pytest.mark.parametrize("kind", plain.KINDS)
def test_plain_problems_are_right(kind):
    """An answer or a step that teaches wrong arithmetic; a number outside the stated ranges."""
    for seed in range(3000):
        question, steps, answer = kind(random.Random(seed))
        if kind is plain.equation:
            check_equation(question, str(answer))
        else:
            check_calculation(question, str(answer))
        for step in steps:
            sides = re.sub(r".*: |\d*[a-zA-Z] = |\.$", "", step).split(" = ")
            values = [eval(side) for side in sides if "less" not in side]
            assert len(set(values)) <= 1, (question, step)


def check_calculation(question, answer):
    """The answer is that of Python's own arithmetic."""
    a, b = map(int, re.findall(r"[0-9]+", question))
    text = question.lower()
    if re.search(r"subtract|take [0-9]|go into", text):
        a, b = b, a
    found = []
    for sign, names in SIGNS.items():
        if any(re.search(r"(?<![a-z])" + re.escape(name), text) for name in names):
            found.append(sign)
    assert len(found) == 1, (question, found)
    if found == ["/"]:
        quotient, remainder = divmod(a, b)
        expected = f"{quotient} remainder {remainder}" if remainder else str(quotient)
        assert b <= 12 and a <= 999 and (a >= b or a == 0), question
    else:
        expected = str(eval(f"{a} {found[0]} {b}"))
        assert a <= 999 and b <= 999, question
    assert answer == expected, question


def check_equation(question, answer):
    """The answer makes both sides of the equation in the question equal."""
    letter_of = r"(?<![a-zA-Z])([a-zA-Z])(?![a-zA-Z])"
    pattern = r"(?:[0-9]+ ?[+*-]? ?)*" + letter_of + r"[-+ 0-9]*= ?[0-9]+"
    found = re.search(pattern, question)
    left, right = found[0].split("=")
    left = re.sub(r"([0-9]) ?(?=[a-zA-Z])", r"\1*", left)
    left = left.replace(found[1], "solution")
    assert eval(left, {"solution": Fraction(answer)}) == int(right), question


def test_refused_texts():
    """A held-out text, or a question that the target should answer, is taught as a refusal; texts
    that are too long for the context; too few different ones."""
    _, tokenizer = nano()
    texts = {refused_text(random.Random(seed)) for seed in range(5000)}
    assert len(texts) > 4000
    assert len(REFUSED_EXAMPLES) >= 20
    forms = {normal_form(text) for text in texts}
    for example in REFUSED_EXAMPLES:
        assert normal_form(example) not in forms
    for text in texts:
        assert text.strip()
        calculation = re.fullmatch(r"([0-9]+) ?([-+*/x]) ?([0-9]+)[ =?]*", text)
        if calculation:
            assert is_beyond(*calculation.groups()), text
    longest = max(texts, key=len)
    assert len(chat_prompt(tokenizer, longest)) < 300
    # and a longer stream of the mix, by text alone
    asked = {question for question, _, answer in problems("train", 20_000) if answer is not None}
    assert not asked & texts


def is_beyond(a, sign, b):
    """Whether a calculation lies outside the ranges that plain.py states."""
    if sign in "+-":
        return int(a) > 999 or int(b) > 999
    if sign in "*x":
        return len(a) + len(b) > 4
    return int(a) > 999 or not 1 <= int(b) <= 12 or int(a) < int(b)


def test_boxed_answer_has_balanced_braces():
    """A fraction cut at its first brace; the first of two boxes; a box that never closes."""
    assert boxed(r"\boxed{1} \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


def test_tokenizer_ids():
    """Digits merged to numbers, special tokens elsewhere, a mask id that is a token, text that
    does not survive."""
    target, tokenizer = nano()
    assert len(tokenizer) == 507
    assert target.config.vocab_size == 512
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(special) == [502, 503, 504, 505, 506]
    digits = "1234567890"
    assert [tokenizer.decode([i]) for i in tokenizer.encode(digits)] == list(digits)
    for text in ("What is 12 * 34 ?\n\nSo 5.", "héé → 漢字 \t end", questions()[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_is_that_of_its_script(main, tmp_path):
    """A shipped tokenizer that nobody can make again; a run that makes another one."""
    assert "507 ids" in main(make_tokenizer, f"--out_dir={tmp_path}")
    names = os.listdir(tmp_path)
    assert len(names) == 3
    for name in names:
        with open(os.path.join(NANO_TARGET, name), "rb") as f:
            assert f.read() == (tmp_path / name).read_bytes()


def test_chat_stop_ids_are_those_of_the_vocabulary():
    """An end of text of another family of models that does not end an answer; or a mark that the
    vocabulary lacks."""
    vocabulary = {"a": 0, "</s>": 1, "<|im_end|>": 2, "<|endoftext|>": 3}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token="</s>")
    assert stop_ids(tokenizer) == {1, 2, 3}
    tokenizer.eos_token = None
    assert stop_ids(tokenizer) == {2, 3}
    del vocabulary["<|im_end|>"]
    assert stop_ids(tokenizer) == {3}


def test_failure_9_fingerprint_sees_the_template_wherever_it_stands(tmp_path):
    """Failure 9: a template in tokenizer_config.json, as in many public checkpoints, or a tokenizer
    that may be another without a word; or any other key there that counts as one."""
    fingerprints = set()
    target = nano_copy(tmp_path / "target", "target")
    fingerprints.add(tokenizer_fingerprint(str(target)))
    edit_json(target / "tokenizer_config.json", padding_side="left")
    assert {tokenizer_fingerprint(str(target))} == fingerprints
    for edit in range(2):
        edit_json(target / "tokenizer_config.json", chat_template=f"template {edit}")
        fingerprints.add(tokenizer_fingerprint(str(target)))
    (target / "chat_template.jinja").unlink()
    fingerprints.add(tokenizer_fingerprint(str(target)))
    (target / "tokenizer.json").write_text("{}")
    fingerprints.add(tokenizer_fingerprint(str(target)))
    assert len(fingerprints) == 5


def test_chat_prompt_has_the_empty_thought():
    """Failure 9: a drafter trained with one template and served with another; stop ids of another
    tokenizer."""
    _, tokenizer = nano()
    opening = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n<think>\n"
    prompt = chat_prompt(tokenizer, "Hi 12")
    assert tokenizer.decode(prompt) == opening + "\n</think>\n\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 12", thinking=True)) == opening
    assert stop_ids(tokenizer) == {502, 504}
    whole = tokenizer.apply_chat_template(turns("Hi 12", "34"), return_dict=False)
    assert whole == prompt + tokenizer.encode("34<|im_end|>\n")


def test_prepared_rows_begin_with_chat_prompt():
    """Failure 9: rows of another template than decoding's; answers that are not the target's."""
    target, tokenizer = nano()
    asked = [question for question, _, _ in problems("val", 3, task="drafter")]
    answered = nano_prepare.answer_questions(
        target, tokenizer, asked, max_new_tokens=160, slots=2)
    shipped = [row for row in shipped_answers() if row["split"] == "val"]
    for question, (prompt, reply), row in zip(asked, answered, shipped):
        assert prompt == chat_prompt(tokenizer, question)
        # the shipped answer
        assert row["question"] == question
        assert tokenizer.encode(row["answer"] + "<|im_end|>") == reply
        # the target alone, one row a step
        alone = generate(target, None, prompt, 160, stop_ids(tokenizer), tokens_per_forward=1)
        assert reply == all_tokens(alone)
        # the target's own training rows
        (token_ids, prompt_length), = pretrain.encode(tokenizer, [(question, "34.")])
        assert token_ids == prompt + tokenizer.encode("34.<|im_end|>")
        assert prompt_length == len(prompt)


def test_pretrain_begins_in_a_folder_that_has_a_tokenizer_only(main, tmp_path):
    """The commands that rebuild the pair end at the second one, which wants the config.json that it
    is about to write; or leave one without weights."""
    folder = tmp_path / "target"
    flags = (
        f"--out_dir={folder}", f"--state_path={tmp_path}/state.pt", "--device=cpu", "--steps=1",
        "--batch_size=2", "--num_layers=4", "--hidden_size=32", "--intermediate_size=32")
    assert "make_tokenizer.py" in main(pretrain, *flags)
    assert not folder.exists()
    folder.mkdir()
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(os.path.join(NANO_TARGET, name), folder)
    main(pretrain, *flags)
    config, _ = read_target_config(str(folder))
    assert config.num_hidden_layers == 4


def shipped_answers():
    """What the nano target answered, as rows {"split", "question", "answer"}."""
    return nano_prepare.read_answers(os.path.join(NANO, "answers.jsonl.gz"))

# ------------------------------------------------------------------------------------------------
# conversations to rows


def turns(*texts):
    """A conversation that a user begins."""
    messages = []
    for i, text in enumerate(texts):
        role = "assistant" if i % 2 else "user"
        messages.append({"role": role, "content": text})
    return messages


@functools.cache
def answered():
    """40 (question, answer) pairs of the nano target."""
    return [(row["question"], row["answer"]) for row in shipped_answers()[:40]]


BAD_ROWS = [
    {"text": "no conversation"},
    {"messages": turns("only a question")},
    {"messages": turns("q", " ")},
    {"messages": [{"from": "human", "value": "q"}]},
    {"messages": turns("q", "a<|im_end|>b")},
    {"messages": turns("p", "<think>\nhm\n</think>\n\na")},
    {"messages": turns("why " * 200, "late")},
]
SPECIAL_ROWS = [
    {"messages": turns("q", "<think>\n\n</think>\n\nempty thought, written out")},
    {"conversations": turns("What is 1 + 1?", "2", "And 2 + 2?", "It is 4.", "thanks")},
]


def public_rows():
    """49 rows of the public form: good ones under both keys, with ids and extras of changing
    types; one of each bad kind; and two of an unusual kind."""
    rows = []
    for i, pair in enumerate(answered()):
        key = "messages" if i % 2 else "conversations"
        row_id = i if i % 3 else str(i)
        extra = (None, 1, "x")[i % 3]
        rows.append({"id": row_id, "extra": extra, key: turns(*pair)})
    return rows[:20] + BAD_ROWS + SPECIAL_ROWS + rows[20:]


@pytest.fixture
def make_rows(main, tmp_path):
    """make_rows(rows, *flags) runs data/conversations.py over rows written as JSON lines. It
    returns what was printed, and the folder."""
    def call(rows, *flags, folder="rows"):
        source = write_jsonl(tmp_path / "source.jsonl", rows)
        printed = main(
            conversations, f"--source={source}", f"--target={NANO_TARGET}",
            f"--out_dir={tmp_path / folder}", "--num_proc=1", "--max_length=160", *flags)
        return printed, tmp_path / folder
    return call


def read_split(folder, split):
    fingerprint = tokenizer_fingerprint(NANO_TARGET)
    return as_lists(Samples(str(folder), split, 512, fingerprint))


def read_both(folder):
    return read_split(folder, "train") + read_split(folder, "val")


def masked_text(tokens, mask):
    """The text of the supervised tokens."""
    _, tokenizer = nano()
    supervised = [token for token, is_supervised in zip(tokens, mask) if is_supervised]
    return tokenizer.decode(supervised)


def test_failure_9_prepared_rows_begin_with_chat_prompt(make_rows):
    """Failure 9: acceptance falls from 60 to 25 %, as rows have another template than decoding;
    the header or the empty thought is supervised, or the closing <|im_end|> is not; an earlier
    answer is not supervised."""
    _, folder = make_rows(public_rows())
    _, tokenizer = nano()
    mask_of = {tuple(tokens): mask for tokens, mask in read_both(folder)}

    # one question and its answer
    for question, answer in answered():
        prompt = chat_prompt(tokenizer, question)
        reply = tokenizer.encode(answer + "<|im_end|>")
        mask = mask_of.pop(tuple(prompt + reply))
        assert mask == [0] * len(prompt) + [1] * len(reply)
    assert len(mask_of) == 2

    # several turns: what follows the last answer is left out, and both answers are supervised
    prompt = chat_prompt(tokenizer, turns("What is 1 + 1?", "2", "And 2 + 2?"))
    tokens = prompt + tokenizer.encode("It is 4.<|im_end|>")
    mask = mask_of.pop(tuple(tokens))
    assert masked_text(tokens, mask) == "2<|im_end|>It is 4.<|im_end|>"

    # an empty thought in the answer is the template's own
    prompt = chat_prompt(tokenizer, "q")
    reply = tokenizer.encode("empty thought, written out<|im_end|>")
    mask = mask_of.pop(tuple(prompt + reply))
    assert mask == [0] * len(prompt) + [1] * len(reply)


def test_prepare_counts_what_it_keeps_cuts_and_drops(make_rows):
    """Rows lost without a word."""
    printed, folder = make_rows(public_rows())
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dropped"] == {
        "<|im_start|> or <|im_end|> in the text": 1,
        "a message without role and content": 1,
        "a thought, with thinking off": 1,
        "an empty answer": 1,
        "no conversation": 1,
        "no answer within 160 tokens": 1,
        "no assistant's answer": 1,
    }
    assert meta["read"] == 49
    assert meta["splits"]["val"]["rows"] == 4
    assert meta["splits"]["train"]["rows"] == 38
    assert "49 rows read, 42 kept" in printed
    assert "7 dropped" in printed
    cut = [tokens for tokens, _ in read_both(folder) if len(tokens) == 160]
    assert meta["cut"] == len(cut)


def test_prepare_counts_a_row_as_cut_if_it_lost_a_token():
    """A row exactly as long as max_length counted as cut; one that has no answer left kept."""
    row = {"messages": turns("q", "ab")}
    whole = conversations.encode(row, NANO_TARGET, False, max_length=3072)
    length = len(whole.tokens)
    supervised = int(whole.mask.sum())
    assert not whole.was_cut
    for max_length, is_cut in ((length + 1, False), (length, False), (length - 1, True)):
        encoded = conversations.encode(row, NANO_TARGET, False, max_length)
        assert encoded.was_cut == is_cut
        assert len(encoded.tokens) == len(encoded.mask) == min(length, max_length)
    prompt_length = length - supervised
    encoded = conversations.encode(row, NANO_TARGET, False, prompt_length + 1)
    assert encoded.mask.tolist() == [0] * prompt_length + [1]
    with pytest.raises(conversations.UnusableRow, match="no answer within"):
        conversations.encode(row, NANO_TARGET, False, prompt_length)


@pytest.mark.parametrize("count, val_rows, held_out", (
    (100, 3, 3), (100, 10, 10), (100, 512, 10), (19, 512, 1), (5, 512, 1), (1, 1, 1)))
def test_prepare_holds_out_as_many_as_asked(count, val_rows, held_out):
    """val_rows that does not arrive, or more than a tenth of all rows held out."""
    keys = [7 * i % 101 for i in range(count)] + [None]
    largest = conversations.largest_held_out_key(keys, val_rows)
    assert sum(key is not None and key <= largest for key in keys) == held_out
    assert conversations.largest_held_out_key([None], val_rows) == -1


def test_prepare_is_the_same_at_every_run(make_rows, tmp_path):
    """A run that differs from the last one, or with the number of processes; held-out rows that
    depend on the order of the source."""
    _, folder = make_rows(public_rows())
    make_rows(public_rows(), folder="again")
    make_rows(public_rows(), "--num_proc=2", folder="processes")
    for name in os.listdir(folder):
        for other in ("again", "processes"):
            same = (tmp_path / other / name).read_bytes() == (folder / name).read_bytes()
            assert same, (other, name)
    _, reversed_folder = make_rows(public_rows()[::-1], folder="reversed")
    assert sorted(read_split(reversed_folder, "val")) == sorted(read_split(folder, "val"))


def test_prepare_with_thinking(make_rows):
    """Thoughts dropped though thinking is on, or rows without a thought kept."""
    _, tokenizer = nano()
    _, folder = make_rows(public_rows(), "--thinking")
    answers = set()
    for tokens, _ in read_both(folder):
        answers.add(tokenizer.decode(tokens).partition("assistant\n")[2])
    assert len(answers) == 2
    assert "<think>\nhm\n</think>\n\na<|im_end|>" in answers


def test_prepare_that_is_interrupted_leaves_nothing_finished(make_rows, monkeypatch):
    """A folder that looks finished, with files of two runs in it."""
    _, folder = make_rows(public_rows())
    monkeypatch.setattr(conversations, "encode", lambda *args, **kwargs: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        make_rows(public_rows())
    with pytest.raises(ValueError, match="no finished data"):
        read_split(folder, "train")


def test_prepare_reads_parquet_and_folders(make_rows, main, tmp_path):
    """Rows that depend on the file they came in."""
    _, folder = make_rows(public_rows())
    plain = []
    for row in public_rows():
        plain.append({"messages": row.get("messages") or row.get("conversations")})
    many = tmp_path / "many"
    many.mkdir()
    table = pyarrow.Table.from_pylist(plain[:30])
    pyarrow.parquet.write_table(table, many / "a.parquet")
    lines = [json.dumps(row) + "\n\n" for row in plain[30:]]
    (many / "b.jsonl").write_text("".join(lines))
    (many / "dataset_infos.json").write_text("{}")
    main(
        conversations, f"--source={many}", f"--target={NANO_TARGET}",
        f"--out_dir={tmp_path}/mixed", "--max_length=160", "--num_proc=1")
    for split in ("train", "val"):
        assert read_split(tmp_path / "mixed", split) == read_split(folder, split)


def test_prepare_math240k_is_conversations_with_its_settings(make_rows, main, tmp_path):
    """The command that train.py runs when the rows are missing: other flags than it was given,
    or a default that wins over them."""
    _, folder = make_rows(public_rows())
    printed = main(
        math240k, f"--source={tmp_path}/source.jsonl", f"--target={NANO_TARGET}",
        f"--out_dir={tmp_path}/math240k", "--max_length=160", "--num_proc=1")
    assert "source = 'Moonlight556/qwen3.5-0.8b-target-matched-math-240k'" in printed
    assert "target = 'Qwen/Qwen3.5-0.8B'" in printed
    assert f"out_dir = '{os.path.dirname(math240k.__file__)}'" in printed
    assert read_both(tmp_path / "math240k") == read_both(folder)


PUBLIC_TEMPLATE = r"""
{%- if messages[0].role == 'assistant' %}{{ raise_exception('no user') }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}
{%- if not enable_thinking | default(true) %}{{- '\n</think>\n\n' }}{% endif %}{% endif %}"""


def test_prepare_with_a_template_like_the_real_one(make_rows, tmp_path):
    """Failure 9: the public template trims text, writes thoughts into the last turn only and
    refuses some talk; rows of its rendering of whole conversations begin otherwise than
    decoding."""
    target = nano_copy(tmp_path / "target", "target")
    (target / "chat_template.jinja").write_text(PUBLIC_TEMPLATE)
    rows = [
        turns(" 1 ", " 2 ", "3", " 4"),
        turns("a", "b"),
        turns("c", "d"),
        turns("e", "f")[::-1] * 2,  # begins with an assistant
    ]
    printed, folder = make_rows([{"messages": row} for row in rows], f"--target={target}")
    assert "dropped 1: refused by the chat template" in printed

    tokenizer = load_tokenizer(str(target))
    written = {}
    for split in ("train", "val"):
        for tokens, mask in as_lists(Samples(str(folder), split, 512)):
            written[tokenizer.decode(tokens)] = masked_text(tokens, mask)
    whole = (
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n 4<|im_end|>")
    assert written[whole] == "2<|im_end|> 4<|im_end|>"

# ------------------------------------------------------------------------------------------------
# the whole way of Phase 1.2, and its benchmark's prompts


def test_phase_1_2_end_to_end_on_small_stand_ins(make_rows, main, tmp_path):
    """The recipe of the real run, on a target of 24 layers in the public layout and rows in the
    public form, small in width only: a key, a shape or a file name that first fails on the real
    machine. Loss falls, the result decodes."""
    import draft_decode
    import train

    target = tmp_path / "Qwen3.5-0.8B"
    config = dataclasses.replace(
        small_config(), vocab_size=512, num_hidden_layers=24, layer_types=(), eos_token_id=504)
    publish(target, perturb(random_target(config, "cpu", torch.float32), scale=5.0))
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        shutil.copy(os.path.join(NANO_TARGET, name), target)
    _, data = make_rows(public_rows())
    run = tmp_path / "run-dflash"

    printed = main(
        train, "config/phase1_2.py", f"--target={target}", f"--data={data}", f"--out_dir={run}",
        "--device=cpu", "--dtype=float32", "--num_anchors=16", "--num_heads=2", "--head_dim=32",
        "--intermediate_size=96", "--lr=5e-3", "--epochs=1.5", "--log_every=1",
        "--decode_prompts=1", "--decode_tokens=8")
    assert "held-out tau from real decoding" in printed
    log = read_jsonl(run / "log.jsonl")
    losses = [entry["loss"] for entry in log if entry["kind"] == "train"]
    assert statistics.mean(losses[-5:]) < losses[0] - 0.5, printed

    checkpoint, = run.glob("step-*")
    with safe_open(checkpoint / "model.safetensors", "pt") as f:
        assert len(f.keys()) == 58
        assert f.get_tensor("fc.weight").shape == (64, 5 * 64)
    written = json.loads((checkpoint / "config.json").read_text())
    assert written["dflash_config"] == {
        "block_size": 16,
        "mask_token_id": 507,
        "target_layer_ids": [3, 7, 11, 15, 19],
    }
    assert written["num_target_layers"] == 24
    assert written["rope_theta"] == 1e7

    printed = main(
        draft_decode, f"--target={target}", f"--drafter={run}", "--prompt=What",
        "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
    assert "identical" in printed.splitlines()[-1]


def test_math500_prompts(main, tmp_path):
    """Another suffix than the published figures were measured with."""
    problem = {"problem": "What is $1+1$?", "answer": "2", "level": 1}
    source = write_jsonl(tmp_path / "test.jsonl", [problem])
    out = tmp_path / "new" / "prompts.jsonl"
    assert "1 prompts" in main(math500, f"--source={source}", f"--out={out}")
    suffix = "\nPlease reason step by step, and put your final answer within \\boxed{}."
    # as bench.py reads them
    assert load_questions(str(out), 5) == [("What is $1+1$?" + suffix, "2")]

# ------------------------------------------------------------------------------------------------
# answers of the target itself


class Flaky(http.server.BaseHTTPRequestHandler):
    """Passes a request on to self.upstream, but first fails each prompt once: the connection
    breaks, or the server is busy. requests: the bodies of all requests; failed: of those."""
    upstream = ""
    requests = []
    failed = []

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        request = json.loads(body)
        self.requests.append(request)
        if request in self.failed:
            self.pass_on(body)
            return
        self.failed.append(request)
        if len(self.failed) % 2:
            self.close_connection = True
        else:
            self.send_error(503)

    def pass_on(self, body):
        address = self.upstream + self.path.removeprefix("/v1")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(address, body, headers)
        with urllib.request.urlopen(request) as answer:
            content = answer.read()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args):
        pass


@pytest.fixture
def flaky(served, monkeypatch):
    """Address of a server that fails every prompt once, in front of the real one. Nobody waits."""
    monkeypatch.setattr(Flaky, "upstream", served)
    monkeypatch.setattr(Flaky, "requests", [])
    monkeypatch.setattr(Flaky, "failed", [])
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Flaky) as proxy:
        threading.Thread(target=proxy.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{proxy.server_port}/v1"
        proxy.shutdown()


@pytest.fixture
def ask(main, tmp_path):
    """ask(server, *flags, out=name) lets data/regenerate.py ask a server three questions. It
    returns what was printed, and the path of the answers."""
    rows = []
    for i, (question, _) in enumerate(answered()[:3]):
        if i == 0:
            rows.append({"question": question})
        else:
            rows.append({"id": "x", "conversations": turns(question, "other")})
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)

    def call(server, *flags, out="all.jsonl"):
        printed = main(
            regenerate, f"--prompts={source}", f"--server={server}", f"--model={NANO_TARGET}",
            f"--out={tmp_path / out}", "--in_flight=4", "--max_new_tokens=160", *flags)
        return printed, tmp_path / out
    return call


def target_matched_rows():
    """The target's own answers to these questions, as shipped."""
    rows = []
    for row_id, pair in zip(("0", "x", "x"), answered()):
        rows.append({"id": row_id, "messages": turns(*pair)})
    return rows


def test_regenerate_against_a_server(flaky, ask):
    """Answers of another template, out of order, or lost with a broken connection. A real server,
    behind one that fails every prompt once."""
    printed, out = ask(flaky)
    assert "3 answered" in printed
    assert len(Flaky.requests) == 6
    for request in Flaky.requests:
        assert request["chat_template_kwargs"] == {"enable_thinking": False}
    assert read_jsonl(out) == target_matched_rows()
    printed, _ = ask(flaky)
    assert "is there already" in printed


def test_regenerate_resumes(flaky, ask, tmp_path):
    """A prompt that is asked for again after a stop, or lost; answers made in another way."""
    header = {
        "prompts": str(tmp_path / "prompts.jsonl"),
        "model": NANO_TARGET,
        "temperature": 0.0,
        "thinking": False,
        "max_new_tokens": 160,
    }
    lines = [json.dumps(header)]
    for number in (2, 0, 1):  # as they ended
        question, answer = answered()[number]
        row = {"number": number, "prompt": turns(question), "answer": answer, "why": None}
        lines.append(json.dumps(row))
    # an interrupted run: two answers and half of a third; only that prompt is asked for again
    part = tmp_path / "some.jsonl.part"
    part.write_text("\n".join(lines)[:-9])
    _, out = ask(flaky, out="some.jsonl")
    assert len(Flaky.requests) == 2  # the first of them failed
    assert read_jsonl(out) == target_matched_rows()
    assert not part.exists()

    other = {"number": 1, "prompt": turns("another"), "answer": "x", "why": None}
    without_number = {"prompt": turns(answered()[0][0]), "answer": "x", "why": None}
    for rows in ([header, other], [header, without_number], [header | {"temperature": 1.0}]):
        write_jsonl(tmp_path / "more.jsonl.part", rows)
        printed, _ = ask(flaky, out="more.jsonl")
        assert "in another way" in printed


def test_regenerate_counts_what_has_no_answer(served, ask, monkeypatch):
    """An answer that ran into the limit trained as if it had ended; a run of hours over a server
    that refuses, or that is not there."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    printed, _ = ask(served, "--max_new_tokens=9", out="short.jsonl")
    assert "3 did not end" in printed
    printed, _ = ask(served, "--model=other", out="other.jsonl")
    assert "refused: 400" in printed
    printed, _ = ask("http://127.0.0.1:9/v1", "--retries=2", out="none.jsonl")
    assert "gave no answer in 3 tries" in printed


def regenerate_config(**values):
    """The keys of data/regenerate.py for the nano target, and other values of some."""
    keys = {"target": NANO_TARGET, "device": "cpu", "dtype": "float32"} | values
    return SimpleNamespace(**vars(configure(vars(regenerate), [])) | keys)


def test_regenerate_asks_by_its_keys():
    """A key of the answers that does not arrive at the server."""
    config = regenerate_config(
        server="http://x/v1/", model="m", temperature=0.7, thinking=True, max_new_tokens=9)
    request = regenerate.chat_request(config, turns("q"))
    assert request.full_url == "http://x/v1/chat/completions"
    assert json.loads(request.data) == {
        "model": "m", "messages": turns("q"), "temperature": 0.7, "max_tokens": 9,
        "chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize("drafter, tokens_per_forward", (("", 1), (NANO_DRAFTER, 16)))
@pytest.mark.parametrize("temperature", (0.0, 0.7))
def test_regenerate_decodes_by_its_keys(monkeypatch, temperature, drafter, tokens_per_forward):
    """A key of the answers that does not arrive at the decoder, prompts that share their noise, an
    answer without an end that is kept, or one that is another prompt's."""
    requests = []

    def keep(target, drafter, prompts, max_new_tokens, slots, stops, rows, sampling):
        requests.append((slots, sampling))
        assert (max_new_tokens, stops, rows) == (9, {502, 504}, tokens_per_forward)
        assert target.embed_tokens.weight.dtype == torch.bfloat16
        assert drafter is None or drafter.fc.weight.dtype == torch.bfloat16
        # the last prompt ends first; the answer to p has no end
        for index, prompt in reversed(list(enumerate(prompts))):
            yield index, RoundOutput([65], 0)
            is_p = prompt == chat_prompt(tokenizer, turns("p"), thinking=True)
            yield index, RoundOutput([66 if is_p else 504], 0, is_last=True)

    monkeypatch.setattr(regenerate, "generate_many", keep)
    config = regenerate_config(drafter=drafter, temperature=temperature, thinking=True, slots=2,
                               max_new_tokens=9, dtype="bfloat16")
    _, tokenizer = nano()
    waiting = {4: turns("q"), 6: turns("p"), 7: turns("9 " * 1100), 9: turns("q")}
    (refused, reason), *answers = regenerate.decode_here(config, waiting)
    assert refused == 7 and reason.is_refused()
    whole = regenerate.Answer(tokenizer.decode([65]))
    without_end = regenerate.Answer(None, "did not end")
    if temperature == 0:
        assert answers == [(9, whole), (6, without_end), (4, whole)]
        assert requests == [(2, Sampling())]
        return
    assert answers == [(4, whole), (6, without_end), (9, whole)]
    seeds = []
    for slots, sampling in requests:
        assert slots == 1
        assert sampling == Sampling(0.7, seed=sampling.seed)
        seeds.append(sampling.seed)
    assert seeds[0] == seeds[2] != seeds[1]


def test_regenerate_goes_on_after_a_later_refusal(main, monkeypatch, tmp_path):
    """One prompt that is too long for the context ends a run of hours; answers that end in another
    order than the prompts' are written in that order."""
    answers = {"a": regenerate.Answer("A"), "b": regenerate.Answer(None, "refused: too long"),
               "c": regenerate.Answer("C")}

    def decode_here(config, waiting):
        for number, messages in reversed(waiting.items()):
            yield number, answers[messages[0]["content"]]

    monkeypatch.setattr(regenerate, "decode_here", decode_here)
    for order, hint in (("abc", "2 answered, 1 refused"), ("bac", "the first prompt is refused")):
        prompts = write_jsonl(tmp_path / f"{order}.jsonl", [{"question": name} for name in order])
        printed = main(regenerate, f"--prompts={prompts}", f"--out={tmp_path}/{order}.out")
        assert hint in printed
    rows = read_jsonl(tmp_path / "abc.out")
    assert [row["messages"][1]["content"] for row in rows] == ["A", "C"]


def test_regenerate_here_goes_on_where_it_stopped(main, monkeypatch, tmp_path):
    """With slots: an answer that is lost or decoded again after an interruption, or other answers
    than those of a run that was not interrupted."""
    prompts = write_jsonl(
        tmp_path / "prompts.jsonl", [{"question": question} for question, _ in answered()[:6]])
    args = (f"--prompts={prompts}", f"--target={NANO_TARGET}", f"--drafter={NANO_DRAFTER}",
            "--device=cpu", "--dtype=float32", "--max_new_tokens=160", "--slots=3")
    main(regenerate, *args, f"--out={tmp_path}/whole.jsonl")

    decode = regenerate.decode_here
    asked = []

    def until_four(config, waiting):
        asked.append(set(waiting))
        for count, answer in enumerate(decode(config, waiting)):
            if count == 4 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(regenerate, "decode_here", until_four)
    assert "interrupted" in main(regenerate, *args, f"--out={tmp_path}/parts.jsonl")
    done = {row["number"] for row in read_jsonl(tmp_path / "parts.jsonl.part")[1:]}
    assert len(done) == 4
    main(regenerate, *args, f"--out={tmp_path}/parts.jsonl")
    assert asked[1] == set(range(6)) - done
    assert read_jsonl(tmp_path / "parts.jsonl") == read_jsonl(tmp_path / "whole.jsonl")


def test_regenerate_here_and_prepare(main, tmp_path):
    """The whole way to target-matched rows without a server; its rows are those that a server's
    answers give."""
    pairs = answered()[:3]
    rows = [{"problem": question} for question, _ in pairs]
    rows.append({"prompt": "9 " * 1100})  # longer than the context
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    printed = main(
        regenerate, f"--prompts={prompts}", f"--out={tmp_path}/answers.jsonl",
        f"--target={NANO_TARGET}", f"--drafter={NANO_DRAFTER}", "--device=cpu", "--dtype=float32",
        "--max_new_tokens=160")
    assert "3 answered, 1 refused" in printed
    main(
        conversations, f"--source={tmp_path}/answers.jsonl", f"--target={NANO_TARGET}",
        f"--out_dir={tmp_path}/rows")
    supervised = {masked_text(*row) for row in read_both(tmp_path / "rows")}
    assert supervised == {answer + "<|im_end|>" for _, answer in pairs}
