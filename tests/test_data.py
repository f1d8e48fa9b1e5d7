"""Data: samples on disk, the nano problems and tokenizer, conversations, the target's answers."""
import dataclasses
import filecmp
import functools
import http.client
import io
import json
import os
import random
import re
import shutil
import statistics
import time
import urllib.error
import urllib.request
from fractions import Fraction
from types import SimpleNamespace

import pyarrow.parquet
import pytest
import torch

import draft_decode
import train
from benchmarks.prompts import load_questions
from tokenizer import chat_prompt, load_tokenizer, stop_ids, tokenizer_fingerprint
from checkpoint import load_target, random_target
from configurator import configure
from data import conversations, regenerate
from data.math240k import prepare as math240k
from data.math500 import prepare as math500
from data.nano import make_tokenizer, plain, pretrain, words
from data.nano import prepare as nano_prepare
from data.nano.problems import boxed, problems, split_of
from data.nano.refusals import REFUSAL, REFUSED_EXAMPLES, normal_form, refused_text
from data.rows import Conversation, UnusableRow
from data.samples import Samples, write_samples
from draft_decode import RoundOutput, generate
from sampling import Sampling
from tests.common import (
    NANO, NANO_DRAFTER, NANO_TARGET, all_tokens, edit_json, nano, nano_copy, perturb, publish,
    questions, read_jsonl, small_config, write_jsonl)

TOKENIZER_FILES = ["chat_template.jinja", "tokenizer.json", "tokenizer_config.json"]

# ------------------------------------------------------------------------------------------------
# samples on disk


def as_lists(samples):
    """Samples as a list of (tokens, mask), both lists."""
    return [(samples[i][0].tolist(), samples[i][1].tolist()) for i in range(len(samples))]


def test_samples_round_trip(tmp_path):
    """Ids above 65,535 wrap in uint16; samples without a supervised token are kept."""
    first = ([1, 70_000, 248_319], [0, 1, 1])
    last = ([65_536], [1])
    splits = {"train": [first, ([5], [0]), last], "val": []}
    meta = write_samples(str(tmp_path), splits, {"vocab_size": 248_320})
    assert as_lists(Samples(str(tmp_path), "train", 248_320)) == [first, last]
    assert meta["splits"]["train"] == {"rows": 2, "dropped": 1, "tokens": 4, "supervised": 3}


@pytest.mark.parametrize("split, vocab_size, hint", (
    ("train", 513, "512.*513"),
    ("val", 512, "no samples"),
    ("x", 512, "no samples"),
    ("train", 512, "5 tokens, meta.json says 4"),
    ("train", 512, "no meta.json"),
))
def test_samples_of_another_target_or_run_are_refused(tmp_path, split, vocab_size, hint):
    """Training silently uses samples of a different vocabulary, an empty split, files that an
    interrupted run left behind, or an unfinished folder; the hint names the wrong script."""
    splits = {"train": [([1, 2, 3, 4], [0, 1, 1, 1])], "val": []}
    write_samples(str(tmp_path), splits, {"vocab_size": 512})
    if "5 tokens" in hint:
        with open(tmp_path / "train.tokens.bin", "ab") as f:
            f.write(b"1234")
    if "no meta.json" in hint:
        (tmp_path / "meta.json").unlink()  # it is written last
    with pytest.raises(ValueError, match=f"{hint}.*run python data/conversations.py"):
        Samples(str(tmp_path), split, vocab_size)
    (tmp_path / "prepare.py").touch()
    with pytest.raises(ValueError, match=f"{hint}.*run python {tmp_path}/prepare.py"):
        Samples(str(tmp_path), split, vocab_size)


@pytest.mark.parametrize("token, is_valid", ((511, True), (512, False), (600, False), (-1, False)))
def test_samples_outside_the_vocabulary_are_refused(tmp_path, token, is_valid):
    """Ids of a different tokenizer reach the embedding and crash the GPU without a clear message;
    the last valid id is refused; a failed run leaves a folder that looks finished."""
    folder = str(tmp_path)
    write_samples(folder, {"train": [([1, 2], [0, 1])]}, {"vocab_size": 512})
    splits = {"train": [([1, 2], [0, 1]), ([3, token], [0, 1])]}
    if is_valid:
        write_samples(folder, splits, {"vocab_size": 512})
        return
    with pytest.raises(ValueError, match="sample 1 has token ids .*outside the vocabulary of 512"):
        write_samples(folder, splits, {"vocab_size": 512})
    assert not (tmp_path / "meta.json").exists()

# ------------------------------------------------------------------------------------------------
# the nano task: problems, tokenizer, chat template, answers


@pytest.mark.parametrize("task", ("words", "plain", "refusals", "target", "drafter"))
def test_problems_are_disjoint(task):
    """A question in two splits, a stream that depends on the run, a box that is not the answer."""
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


@pytest.mark.parametrize("mix, fraction", (("target", 0.15), ("drafter", 0.10)))
def test_mix_has_all_tasks(mix, fraction):
    """A task that is never trained or that crowds out the others; the two mixes exchanged."""
    refused = sum(answer is None for _, _, answer in problems("train", 2000, task=mix))
    assert refused / 2000 == pytest.approx(fraction, abs=0.03)
    with pytest.raises(ValueError, match="use one of words, plain, refusals, tok"):
        next(problems("train", 1, task="nano"))


def count_right_equations(steps):
    """The number of "a + b = c" in a text. All sides of each must be equal."""
    equations = re.findall(r"[0-9][-+*/ 0-9]*(?:= [-+*/ 0-9]+)+", steps)
    for equation in equations:
        values = {eval(side) for side in equation.split("=")}
        assert len(values) == 1, equation
    return len(equations)


@pytest.mark.parametrize("kind", (*words.KINDS, *plain.KINDS))
def test_solutions_are_right(kind):
    """An answer or a step that teaches wrong arithmetic; a number outside the documented range."""
    count = 0
    for seed in range(3000):
        question, steps, answer = kind(random.Random(seed))
        count += count_right_equations("\n".join(steps))
        if kind is plain.equation:
            check_equation(question, str(answer))
        elif kind in plain.KINDS:
            check_calculation(question, str(answer))
        else:
            assert re.search(rf"\b{answer}\b", steps[-1]), question
    assert count >= 3000


SIGNS = {  # the sign of a calculation: how people write it
    "+": r"\+|plus|add|sum|together",
    "-": r"-|−|minus|subtract|difference|take|less",
    "*": r"\*|x|×|times|multipl|product",
    "/": r"/|÷|divide|quotient|go into|over",
}


def check_calculation(question, answer):
    """Python's own arithmetic gives the same answer."""
    a, b = map(int, re.findall(r"[0-9]+", question))
    text = question.lower()
    if re.search(r"subtract|take [0-9]|go into", text):
        a, b = b, a
    sign, = [sign for sign, names in SIGNS.items() if re.search(rf"(?<![a-z])({names})", text)]
    quotient, _, remainder = answer.partition(" remainder ")
    if sign == "/":
        assert (int(quotient), int(remainder or 0)) == divmod(a, b), question
    else:
        assert int(answer) == eval(f"{a} {sign} {b}"), question
    assert not is_beyond(a, sign, b), question


def check_equation(question, answer):
    """The answer makes both sides of the equation in the question equal."""
    letter_alone = r"(?<![a-zA-Z])([a-zA-Z])(?![a-zA-Z])"
    equation = re.search(rf"(?:[0-9]+ ?[+*-]? ?)*{letter_alone}[-+ 0-9]*= ?[0-9]+", question)
    left, right = equation[0].split("=")
    left = re.sub(r"([0-9]) ?(?=[a-zA-Z])", r"\1*", left).replace(equation[1], "solution")
    assert eval(left, {"solution": Fraction(answer)}) == int(right), question


def test_refused_texts():
    """The target learns to refuse a held-out text or a question that it should answer; texts too
    long for the context; too few different texts."""
    texts = {refused_text(random.Random(seed)) for seed in range(5000)}
    assert len(texts) > 4000
    held_out = {normal_form(example) for example in REFUSED_EXAMPLES}
    assert held_out.isdisjoint(normal_form(text) for text in texts)
    for text in texts:
        assert text.strip(), text
        calculation = re.fullmatch(r"([0-9]+) ?([-+*/x]) ?([0-9]+)[ =?]*", text)
        if calculation:
            a, sign, b = calculation.groups()
            assert is_beyond(int(a), sign.replace("x", "*"), int(b)), text
    assert len(chat_prompt(nano()[1], max(texts, key=len))) < 300
    asked = {question for question, _, answer in problems("train", 20_000) if answer is not None}
    assert not asked & texts


def is_beyond(a, sign, b):
    """Whether a calculation is outside the ranges that plain.py documents."""
    if sign == "*":
        return len(f"{a}{b}") > 4
    if sign == "/":
        return a > 999 or not 1 <= b <= 12 or 0 < a < b
    return a > 999 or b > 999


def test_boxed_answer_has_balanced_braces():
    """A fraction cut at its first brace, the first of two boxes, a box that never closes."""
    assert boxed(r"\boxed{1} \boxed{\frac{1}{2}}") == r"\frac{1}{2}"
    assert boxed(r"\boxed{1") is None
    assert boxed("1") is None


def test_tokenizer_is_the_scripts_and_keeps_its_ids(main, tmp_path):
    """Nobody can make the shipped tokenizer again; merged digits, special tokens with other ids,
    text that decoding changes."""
    assert "507 ids" in main(make_tokenizer, f"--out_dir={tmp_path}")
    same, _, _ = filecmp.cmpfiles(NANO_TARGET, tmp_path, TOKENIZER_FILES, shallow=False)
    assert same == TOKENIZER_FILES

    _, tokenizer = nano()
    assert len(tokenizer) == 507
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    assert tokenizer.convert_tokens_to_ids(special) == [502, 503, 504, 505, 506]
    assert len(tokenizer.encode("1234567890")) == 10
    for text in ("What is 12 * 34 ?\n\nSo 5.", "héé → 漢字 \t end", questions()[0]):
        assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_stop_ids_are_in_the_vocabulary():
    """A model family's end of text does not end an answer; a stop id that the vocabulary lacks."""
    vocabulary = {"a": 0, "</s>": 1, "<|im_end|>": 2, "<|endoftext|>": 3}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocabulary, eos_token="</s>")
    assert stop_ids(tokenizer) == {1, 2, 3}
    tokenizer.eos_token = None
    del vocabulary["<|im_end|>"]
    assert stop_ids(tokenizer) == {3}


def test_failure_9_fingerprint_sees_every_template_and_tokenizer(tmp_path):
    """Failure 9: the fingerprint misses a changed tokenizer or a template in tokenizer_config.json,
    which many public checkpoints have; or an unrelated key there changes it."""
    target = nano_copy(tmp_path / "target", "target")
    before = tokenizer_fingerprint(str(target))
    edit_json(target / "tokenizer_config.json", padding_side="left")
    assert tokenizer_fingerprint(str(target)) == before
    edit_json(target / "tokenizer_config.json", chat_template="a template")
    with_template = tokenizer_fingerprint(str(target))
    (target / "chat_template.jinja").unlink()
    without_jinja = tokenizer_fingerprint(str(target))
    (target / "tokenizer.json").write_text("{}")
    changed = {with_template, without_jinja, tokenizer_fingerprint(str(target))}
    assert len(changed - {before}) == 3


def test_chat_prompt_has_the_empty_thought():
    """Failure 9: a drafter is trained with one template and served with a different one."""
    _, tokenizer = nano()
    opening = "<|im_start|>user\nHi 12<|im_end|>\n<|im_start|>assistant\n<think>\n"
    prompt = chat_prompt(tokenizer, "Hi 12")
    assert tokenizer.decode(prompt) == opening + "\n</think>\n\n"
    assert tokenizer.decode(chat_prompt(tokenizer, "Hi 12", thinking=True)) == opening
    assert stop_ids(tokenizer) == {502, 504}
    whole = tokenizer.apply_chat_template(turns("Hi 12", "34"), return_dict=False)
    assert whole == prompt + tokenizer.encode("34<|im_end|>\n")


def test_prepared_rows_begin_with_chat_prompt():
    """Failure 9: samples with a different template than decoding's; shipped answers that are not
    the target's; answers from forwards that the target alone would not run."""
    target, tokenizer = nano()
    asked = [question for question, _, _ in problems("val", 3, task="drafter")]
    config = SimpleNamespace(max_new_tokens=160, slots=2)
    answered = nano_prepare.answer_questions(target, tokenizer, asked, config)
    shipped = [row for row in shipped_answers() if row["split"] == "val"]
    for question, (prompt, reply), row in zip(asked, answered, shipped):
        assert prompt == chat_prompt(tokenizer, question)
        assert row["question"] == question
        assert tokenizer.encode(row["answer"] + "<|im_end|>") == reply
        alone = generate(target, None, prompt, max_new_tokens=160,
                         stop_token_ids=stop_ids(tokenizer),
                         tokens_per_forward=1)
        assert reply == all_tokens(alone)
        # the samples that the target itself is trained on
        (token_ids, prompt_length), = pretrain.encode(tokenizer, [(question, "34.")])
        assert token_ids == prompt + tokenizer.encode("34.<|im_end|>")
        assert prompt_length == len(prompt)


def test_pretrain_begins_in_a_folder_that_has_a_tokenizer_only(main, tmp_path):
    """The second command that rebuilds the pair needs the config.json that it is about to write."""
    folder = tmp_path / "target"
    flags = (f"--out_dir={folder}", "--device=cpu", "--steps=1", "--batch_size=2")
    assert "make_tokenizer.py" in main(pretrain, *flags)
    assert not folder.exists()
    folder.mkdir()
    for name in TOKENIZER_FILES:
        shutil.copy(os.path.join(NANO_TARGET, name), folder)
    main(pretrain, *flags)
    assert load_target(str(folder)).config == nano()[0].config


def shipped_answers():
    """The nano target's answers, as rows {"split", "question", "answer"}."""
    return nano_prepare.read_answers(os.path.join(NANO, "answers.jsonl.gz"))

# ------------------------------------------------------------------------------------------------
# from conversations to samples


def turns(*texts):
    """A conversation that a user begins."""
    roles = ("user", "assistant") * len(texts)
    return [{"role": role, "content": text} for role, text in zip(roles, texts)]


@functools.cache
def answered():
    """40 (question, answer) pairs of the nano target."""
    return [(row["question"], row["answer"]) for row in shipped_answers()[:40]]


BAD_ROWS = {  # why a row is dropped: the row
    "no conversation": {"text": "no conversation"},
    "no assistant's answer": {"messages": turns("only a question")},
    "an empty answer": {"messages": turns("q", " ")},
    "a message without role and content": {"messages": [{"role": "user", "text": "q"}]},
    "a special token in the text: <|im_end|>": {"messages": turns("q", "a<|im_end|>b")},
    "a thought, with thinking off": {"messages": turns("p", "<think>\nhm\n</think>\n\na")},
    "no answer within 160 tokens": {"messages": turns("why " * 200, "late")},
}
SPECIAL_ROWS = [
    {"messages": turns("q", "<think>\n\n</think>\n\nempty thought, written out")},
    {"conversations": turns("What is 1 + 1?", "2", "And 2 + 2?", "It is 4.", "thanks")},
]


def public_rows():
    """49 rows in the public form: good ones under both keys with extras of changing types, one of
    each bad kind, and two special ones."""
    rows = []
    for i, pair in enumerate(answered()):
        key = "messages" if i % 2 else "conversations"
        rows.append({"extra": (None, 1, "x")[i % 3], key: turns(*pair)})
    return rows[:20] + list(BAD_ROWS.values()) + SPECIAL_ROWS + rows[20:]


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
    fingerprint = tokenizer_fingerprint(NANO_TARGET)
    splits = [Samples(str(folder), split, 512, fingerprint) for split in ("val", "train")]
    return as_lists(splits[0]) + as_lists(splits[1])


def masked_text(tokens, mask):
    """The text of the supervised tokens."""
    _, tokenizer = nano()
    supervised = [token for token, is_supervised in zip(tokens, mask) if is_supervised]
    return tokenizer.decode(supervised)


def test_failure_9_samples_begin_with_chat_prompt(make_samples):
    """Failure 9: acceptance falls from 60 to 25 % because samples have a different template than
    decoding; the header or the empty thought is supervised; the closing <|im_end|> or an earlier
    answer is not supervised."""
    _, folder = make_samples(public_rows())
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


@pytest.mark.parametrize("val_rows, held_out", ((1, 1), (3, 3), (512, 4)))
def test_prepare_counts_what_it_keeps_cuts_and_drops(make_samples, val_rows, held_out):
    """Rows are lost silently; val_rows is ignored, or more than a tenth of all rows is held out."""
    printed, folder = make_samples(public_rows(), f"--val_rows={val_rows}")
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["dropped"] == dict.fromkeys(sorted(BAD_ROWS), 1)
    assert meta["read"] == 49
    assert meta["splits"]["val"]["rows"] == held_out
    assert meta["splits"]["train"]["rows"] == 42 - held_out
    assert "49 rows read, 42 kept" in printed and "7 dropped" in printed
    assert meta["cut"] == sum(len(tokens) == 160 for tokens, _ in read_both(folder))


def test_prepare_cuts_at_max_length():
    """A row of exactly max_length tokens counts as cut; a row without an answer token is kept."""
    row = Conversation(turns("q", "ab"))
    whole = conversations.encode(row, NANO_TARGET, False, max_length=3072)
    length = len(whole.tokens)
    assert not conversations.encode(row, NANO_TARGET, False, length).was_cut
    prompt_length = length - int(whole.mask.sum())
    encoded = conversations.encode(row, NANO_TARGET, False, prompt_length + 1)
    assert encoded.was_cut
    assert encoded.mask.tolist() == [0] * prompt_length + [1]
    with pytest.raises(UnusableRow, match="no answer within"):
        conversations.encode(row, NANO_TARGET, False, prompt_length)


def test_prepare_is_the_same_at_every_run(make_samples, tmp_path):
    """A run depends on the number of processes or on the form or order of its source."""
    _, folder = make_samples(public_rows())
    make_samples(public_rows(), "--num_proc=2", folder="processes")
    for path in folder.iterdir():
        assert path.read_bytes() == (tmp_path / "processes" / path.name).read_bytes(), path.name
    _, reversed_folder = make_samples(public_rows()[::-1], folder="reversed")
    assert sorted(read_both(reversed_folder)[:4]) == sorted(read_both(folder)[:4])

    many = tmp_path / "many"
    many.mkdir()
    first_rows = [{"messages": turns(*pair)} for pair in answered()[:20]]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(first_rows), many / "a.parquet")
    write_jsonl(many / "b.jsonl", public_rows()[20:] + [""])
    (many / "dataset_infos.json").write_text("{}")
    _, mixed = make_samples([], f"--source={many}", folder="mixed")
    assert read_both(mixed) == read_both(folder)


def test_prepare_math240k_is_conversations_with_its_settings(make_samples):
    """The command that train.py runs has different settings, or its settings win over the flags."""
    _, folder = make_samples(public_rows())
    printed, math_folder = make_samples(public_rows(), folder="math240k", script=math240k)
    assert "source = 'Moonlight556/qwen3.5-0.8b-target-matched-math-240k'" in printed
    assert "target = 'Qwen/Qwen3.5-0.8B'" in printed
    assert f"out_dir = '{os.path.dirname(math240k.__file__)}'" in printed
    assert read_both(math_folder) == read_both(folder)


PUBLIC_TEMPLATE = r"""
{%- if messages[0].role == 'assistant' %}{{ raise_exception('no user') }}{% endif %}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' and loop.last %}{{- '<think>\n\n</think>\n\n' }}{% endif %}
{{- m.content | trim + '<|im_end|>\n' }}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}
{%- if not enable_thinking | default(true) %}{{- '\n</think>\n\n' }}{% endif %}{% endif %}"""


def test_prepare_with_a_template_like_the_real_one(tmp_path):
    """Failure 9: the public template trims text, writes a thought into the last turn only, and
    refuses some conversations. Rendered whole, a sample does not begin like decoding."""
    target = nano_copy(tmp_path / "target", "target")
    (target / "chat_template.jinja").write_text(PUBLIC_TEMPLATE)
    row = Conversation(turns(" 1 ", " 2 ", "3", " 4"))
    encoded = conversations.encode(row, str(target), False, 160)
    assert load_tokenizer(str(target)).decode(encoded.tokens) == (
        "<|im_start|>user\n1<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n"
        "<|im_start|>user\n3<|im_end|>\n"
        "<|im_start|>assistant\n<think>\n\n</think>\n\n 4<|im_end|>")
    assert masked_text(encoded.tokens, encoded.mask) == "2<|im_end|> 4<|im_end|>"
    row = Conversation(turns("e", "f")[::-1] * 2)  # begins with an assistant
    with pytest.raises(UnusableRow, match=r"refused by the chat template \(TemplateError\)"):
        conversations.encode(row, str(target), False, 160)


def test_phase_1_2_end_to_end_on_small_stand_ins(make_samples, main, monkeypatch, tmp_path):
    """A key, a shape, or a file name that fails only on the real machine. The recipe of the real
    run trains a narrow target of 24 layers, with all files in the public form."""
    target = tmp_path / "Qwen3.5-0.8B"
    config = dataclasses.replace(
        small_config(), vocab_size=512, num_hidden_layers=24, layer_types=(), eos_token_id=504)
    publish(target, perturb(random_target(config, "cpu", torch.float32), scale=5.0))
    for name in TOKENIZER_FILES:
        shutil.copy(os.path.join(NANO_TARGET, name), target)
    _, data = make_samples(public_rows())
    run = tmp_path / "run-dflash"

    monkeypatch.setattr(train, "DECODE_TOKENS", 8)
    printed = main(
        train, "config/phase1_2.py", f"--target={target}", f"--data={data}", f"--out_dir={run}",
        "--device=cpu", "--dtype=float32", "--num_anchors=16", "--num_heads=2", "--head_dim=32",
        "--intermediate_size=96", "--lr=5e-3", "--epochs=1.5", "--log_every=1",
        "--decode_prompts=1")
    assert "held-out tau from real decoding" in printed
    log = read_jsonl(run / "log.jsonl")
    losses = [entry["loss"] for entry in log if entry["kind"] == "train"]
    assert statistics.mean(losses[-5:]) < losses[0] - 0.5, printed

    config_file, = run.glob("step-*/config.json")
    written = json.loads(config_file.read_text())
    assert written["dflash_config"] == {
        "block_size": 16, "mask_token_id": 507, "target_layer_ids": [3, 7, 11, 15, 19]}

    printed = main(
        draft_decode, f"--target={target}", f"--drafter={run}", "--prompt=What",
        "--max_new_tokens=20", "--device=cpu", "--dtype=float32")
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


@pytest.fixture
def flaky(monkeypatch):
    """The requests so far to a server that fails each one once: it breaks the connection or says
    that it is busy. Then it gives the shipped answer."""
    requests = []

    def urlopen(request, timeout):
        body = json.loads(request.data)
        is_new = body not in requests
        requests.append(body)
        if is_new and len(requests) % 2:
            raise http.client.RemoteDisconnected("gone")
        if is_new:
            raise urllib.error.HTTPError(request.full_url, 503, "", {}, io.BytesIO(b"busy"))
        answer = dict(answered())[body["messages"][-1]["content"]]
        choice = {"message": {"content": answer}, "finish_reason": "stop"}
        return io.BytesIO(json.dumps({"choices": [choice]}).encode())

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    return requests


@pytest.fixture
def ask(main, tmp_path):
    """ask(server, *flags, out=name) runs data/regenerate.py on three questions. It returns what was
    printed, and the path of the answers."""
    (first, _), (second, _), (third, _) = answered()[:3]
    rows = [{"question": first},
            {"id": "x", "conversations": turns(second, "other")},
            {"id": "y", "conversations": turns(third, "other")}]
    source = write_jsonl(tmp_path / "prompts.jsonl", rows)

    def call(server, *flags, out="all.jsonl"):
        printed = main(
            regenerate, f"--prompts={source}", f"--server={server}", f"--model={NANO_TARGET}",
            f"--out={tmp_path / out}", "--in_flight=4", "--max_new_tokens=160", *flags)
        return printed, tmp_path / out
    return call


def shipped_rows():
    """What ask() has to write: the target's own answers."""
    return [{"id": id, "messages": turns(*pair), "target_turns": [1]}
            for id, pair in zip("0xy", answered())]


def regenerate_config(**values):
    """The keys of data/regenerate.py for the nano target, with some values replaced."""
    keys = {"target": NANO_TARGET, "device": "cpu", "dtype": "float32"} | values
    return SimpleNamespace(**vars(configure(vars(regenerate), [])) | keys)


def test_regenerate_from_a_server_resumes(flaky, ask, tmp_path):
    """A broken connection or an interruption loses a prompt, reorders the answers, or asks for one
    again; a key does not reach the server; answers of different prompts or settings are kept."""
    header = regenerate.part_header(regenerate_config(
        prompts=f"{tmp_path}/prompts.jsonl", model="m", temperature=0.7, thinking=True,
        max_new_tokens=160))
    flags = ("--model=m", "--temperature=0.7", "--thinking")
    rows = []
    for number, prompt in enumerate(regenerate.read_prompts(f"{tmp_path}/prompts.jsonl")):
        question, answer = answered()[number]
        rows.append({"number": number, "prompt": regenerate.checksum(prompt),
                     "message": turns(question, answer)[1], "why": None})
    # one answer and half of the next, out of order
    part = tmp_path / "all.jsonl.part"
    write_jsonl(part, [header, rows[2], rows[0]])
    os.truncate(part, part.stat().st_size - 9)
    _, out = ask("http://x", *flags)
    assert len(flaky) == 4  # two failed and were sent again
    assert flaky[0] in [
        {"model": "m", "messages": turns(question), "temperature": 0.7, "max_tokens": 160,
         "chat_template_kwargs": {"enable_thinking": True}} for question, _ in answered()[:2]]
    assert read_jsonl(out) == shipped_rows()
    assert not part.exists()

    other_prompt = rows[1] | {"prompt": 0}
    no_number = {key: value for key, value in rows[0].items() if key != "number"}
    other_header = header | {"temperature": 1.0}
    for content in ([header, other_prompt], [header, no_number], [header, 7], [other_header]):
        write_jsonl(tmp_path / "more.jsonl.part", content)
        printed, _ = ask("http://x", *flags, out="more.jsonl")
        assert "in another way" in printed


@pytest.mark.parametrize("server, flag, hint", (
    ("", "--retries=2", "3 answered"),
    ("", "--max_new_tokens=9", "3 did not end"),
    ("", "--model=other", "refused: 400"),
    ("http://127.0.0.1:9/v1", "--retries=2", "gave no answer in 3 tries"),
))
def test_regenerate_against_a_server(served, ask, monkeypatch, server, flag, hint):
    """Answers with a different template, or one that reached the limit counts as finished; a run
    waits for hours on a server that refuses or is not there; a finished file is overwritten."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    printed, out = ask(server or served, flag)
    assert hint in printed
    if hint == "3 answered":
        assert read_jsonl(out) == shipped_rows()
        assert "is there already" in ask(served, flag)[0]


@pytest.mark.parametrize("temperature, drafter, tokens_per_forward", (
    (0.0, "", 1), (0.7, NANO_DRAFTER, 16)))
def test_regenerate_decodes_with_its_keys(monkeypatch, temperature, drafter, tokens_per_forward):
    """A key does not reach the decoder; an answer without an end is kept, or an answer goes to a
    different prompt."""
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


def test_regenerate_samples_each_row_as_if_it_were_alone():
    """Rows share their noise, or a sample depends on the rows that are decoded at the same time."""
    config = regenerate_config(drafter=NANO_DRAFTER, temperature=1.5, max_new_tokens=60, slots=3)
    question = turns(answered()[0][0])
    waiting = {number: (question, None) for number in range(5)}
    together = dict(regenerate.decode_here(config, waiting))
    for number in waiting:
        alone, = regenerate.decode_here(config, {number: waiting[number]})
        assert alone == (number, together[number])
    texts = {answer.message["content"] for answer in together.values() if answer.message}
    assert len(texts) > 1


def test_regenerate_here_resumes_and_prepares(main, make_samples, monkeypatch, tmp_path):
    """Without a server: an answer is lost, decoded again, changed, or moved by an interruption; one
    prompt that is too long ends the run; a sample is not the target's own answer."""
    rows = [{"problem": question} for question, _ in answered()[:6]]
    rows.append({"prompt": "9 " * 1100})  # longer than the context
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    out = tmp_path / "answers.jsonl"
    args = (f"--prompts={prompts}", f"--target={NANO_TARGET}", f"--drafter={NANO_DRAFTER}",
            "--device=cpu", "--dtype=float32", "--max_new_tokens=160", "--slots=3", f"--out={out}")
    decode = regenerate.decode_here
    asked = []

    def until_four(config, waiting):
        asked.append(set(waiting))
        for count, answer in enumerate(decode(config, waiting)):
            if count == 4 and len(asked) == 1:
                raise KeyboardInterrupt
            yield answer

    monkeypatch.setattr(regenerate, "decode_here", until_four)
    assert "interrupted" in main(regenerate, *args)
    done = {row["number"] for row in read_jsonl(f"{out}.part")[1:]}
    assert len(done) == 4
    assert "6 answered, 1 refused" in main(regenerate, *args)
    assert asked[1] == set(range(7)) - done
    assert [row["messages"] for row in read_jsonl(out)] == [turns(*pair) for pair in answered()[:6]]
    _, folder = make_samples(read_jsonl(out))
    supervised = {masked_text(*sample) for sample in read_both(folder)}
    assert supervised == {answer + "<|im_end|>" for _, answer in answered()[:6]}
