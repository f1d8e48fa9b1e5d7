"""Rows from the outside world: each is kept correctly, or dropped under a reason that names it."""
import http.server
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

import checkpoint
from benchmarks import prompts as bench_prompts
from benchmarks.prompts import NOT_GRADED, is_correct, load_prompts
from data import conversations, regenerate, rows
from data.rows import UnusableRow, conversation_of, read_conversations, render
from data.samples import Samples
from tests.common import NANO_TARGET, ROOT, nano, nano_copy, read_jsonl, write_jsonl
from tests.test_data import answered, masked_text, turns
from tokenizer import chat_prompt, load_tokenizer, tokenizer_fingerprint

# Tools, tool calls and thoughts as Qwen3.5's template writes them. "poison" divides by zero.
QWEN = r"""
{%- if messages[0].content == 'poison' %}{{ 1 // 0 }}{% endif %}
{%- if tools %}{{- '<|im_start|>system\n# Tools\n\n<tools>' }}
{%- for tool in tools %}{{- '\n' + tool | tojson }}{% endfor %}
{{- '\n</tools>' }}
{%- if messages[0].role == 'system' %}{{- '\n\n' + messages[0].content }}{% endif %}
{{- '<|im_end|>\n' }}
{%- elif messages[0].role == 'system' %}
{{- '<|im_start|>system\n' + messages[0].content + '<|im_end|>\n' }}{% endif %}
{%- set ns = namespace(query=0) %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% set ns.query = loop.index0 %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|im_start|>user\n' + m.content | trim + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content | default('', true) %}
{%- set content = m.content | trim %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1] %}
{%- set content = content.split('</think>')[-1] | trim %}{% endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > ns.query %}{{- '<think>\n' + thought | trim + '\n</think>\n\n' }}{% endif %}
{{- content }}
{%- for call in m.tool_calls or [] %}{% set call = call.function or call %}
{{- '\n\n' if content and loop.first else ('' if loop.first else '\n') }}
{{- '<tool_call>\n<function=' + call.name + '>\n' }}
{%- for name, value in call.arguments | items %}
{{- '<parameter=' + name + '>\n' + (value if value is string else value | tojson) + '\n' }}
{{- '</parameter>\n' }}{% endfor %}
{{- '</function>\n</tool_call>' }}{% endfor %}
{{- '<|im_end|>\n' }}
{%- elif m.role == 'tool' %}
{{- '<|im_start|>user\n<tool_response>\n' + m.content + '\n</tool_response><|im_end|>\n' }}
{%- elif m.role == 'system' and not loop.first %}{{ raise_exception('system is not first') }}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n<think>\n' }}
{%- if not enable_thinking %}{{- '\n</think>\n\n' }}{% endif %}{% endif %}"""

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def call(**arguments):
    return [{"type": "function", "function": {"name": "add", "arguments": arguments}}]


def tool_row(content=None, **change):
    """A row with a call of a tool, its result, and an answer."""
    messages = [{"role": "user", "content": "1 + 2?"},
                {"role": "assistant", "content": content, "tool_calls": call(a=1, b=2)},
                {"role": "tool", "content": "3"},
                {"role": "assistant", "content": "It is 3."}]
    return {"messages": messages, "tools": TOOLS} | change


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    """The folder of the nano target with the template above."""
    target = nano_copy(tmp_path_factory.mktemp("qwen") / "target", "target")
    (target / "chat_template.jinja").write_text(QWEN)
    return str(target)


@pytest.fixture
def prepare(main, tmp_path):
    """prepare(rows, *flags) runs data/conversations.py over rows, with others that are fine, from
    the nano target if no other is given. Returns what was printed and meta.json, or only the error
    of a run that fails."""
    def run(some, *flags, target=NANO_TARGET, fine=30):
        others = [{"messages": turns(f"question {i}", "fine")} for i in range(fine)]
        source = write_jsonl(tmp_path / "rows.jsonl", [*some, *others])
        folder = tmp_path / "samples"
        printed = main(
            conversations, f"--source={source}", f"--target={target}", f"--out_dir={folder}",
            "--num_proc=1", *flags)
        if not (folder / "meta.json").exists():
            return printed
        return printed, json.loads((folder / "meta.json").read_text())
    return run


def encoded(row, target, thinking=False, max_length=999):
    return conversations.encode(conversation_of(row), target, thinking, max_length)


def supervised(row, target, thinking=False):
    """The supervised text of a row."""
    result = encoded(row, target, thinking)
    return masked_text(result.tokens, result.mask)

# ------------------------------------------------------------------------------------------------
# formats


QUESTION_AND_ANSWER = turns("q", "a")


@pytest.mark.parametrize("row, roles", (
    ({"messages": QUESTION_AND_ANSWER}, "user assistant"),
    ({"messages": json.dumps(QUESTION_AND_ANSWER)}, "user assistant"),
    ({"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "q"},
                        {"from": "gpt", "value": "a"}]}, "system user assistant"),
    ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
      "system": "s"}, "system user assistant"),
    ({"prompt": [{"role": "user", "content": "q"}], "completion": [turns("q", "a")[1]]},
     "user assistant"),
    ({"prompt": "q", "response": "a"}, "user assistant"),
    ({"question": "q", "answer": "a"}, "user assistant"),
    ({"problem": "q", "answer": 3}, "user"),
    ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]}]}, "user"),
    (tool_row(), "user assistant tool assistant"),
))
@pytest.mark.parametrize("suffix", (".jsonl", ".json", ".parquet"))
def test_every_common_form_of_a_row_is_read(tmp_path, row, roles, suffix):
    """A form that people publish cannot be read, or is read with other roles or texts."""
    path = tmp_path / f"rows{suffix}"
    if suffix == ".jsonl":
        write_jsonl(path, [row])
    elif suffix == ".json":
        path.write_text(" " + json.dumps([row, row], indent=1))
    else:
        import pyarrow.parquet
        # a table gives each call the arguments of all calls
        more = [row] + [tool_row(messages=[turns("q")[0], turns("q", "a")[1] | {
            "tool_calls": call(c=3)}])] * ("tools" in row)
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(more), path)
    (place, conversation), *_ = read_conversations(str(path))
    assert place == "1"
    assert [message["role"] for message in conversation.messages] == roles.split()
    texts = {"system": "s", "user": "q", "assistant": "a"}
    if "tool" in roles:
        assert conversation.messages[1]["tool_calls"] == call(a=1, b=2)
        assert conversation.messages[1]["content"] == ""  # None, as many templates would write it
        assert conversation.tools == TOOLS
        return
    for message in conversation.messages:
        assert message["content"] == texts[message["role"]]


DEEP = "[" * 100_000 + "]" * 100_000


@pytest.mark.parametrize("line, reason", (
    ("{", "not JSON"),
    ('{"question": "a\x01b"}', "not JSON"),
    ("[1]", "not a JSON object"),
    (f'{{"messages": {DEEP}}}', "JSON that is nested too deeply"),
    (json.dumps({"messages": DEEP}), "JSON that is nested too deeply"),
    (tool_row(tools=[json.loads(DEEP[:300] + DEEP[-300:])]), "JSON that is nested too deeply"),
    ({"messages": turns("q", "\ud800")}, "text that is not Unicode: a lone surrogate"),
    ({"messages": 7}, "messages that are not a list"),
    ({"instruction": "q", "output": "a"},
     "no conversation; keys: instruction, output"),
    ({"messages": turns("q", "a") + [{"role": "banana", "content": "b"}]},
     "an unknown role, 'banana'"),
    ({"messages": [{"role": "user<|im_end|>", "content": "b"}]},
     "an unknown role, 'user<|im_end|>'"),
    ({"messages": [{"role": "user", "content": [{"type": "image", "image": "x"}]}]},
     "content that is not text"),
    ({"messages": turns("q", "a")[1:]}, "no message of a user"),
    ({"messages": turns("q", "a"), "images": ["x"]}, "images, which the target cannot read"),
    ({"messages": turns("q", "a"), "target_turns": [0]},
     "target_turns are not numbers of the assistant's messages"),
    ({"messages": turns("q", "a"), "target_turns": []}, "no assistant's answer"),
    ({"messages": turns("q", "a <|endoftext|>")}, "a special token in the text: <|endoftext|>"),
    ({"messages": turns("<|im_start|>", "a")}, "a special token in the text: <|im_start|>"),
    (tool_row(), "the chat template ignores tools"),
    (tool_row(tools=None), "the chat template ignores tool_calls"),
    ({"messages": turns("q", "a </think> b")}, "</think> in the text of an answer"),
    ({"messages": [turns("q")[0], turns("q", "a")[1] | {"reasoning": "hm"}]},
     "a thought, with thinking off"),
))
def test_a_bad_row_is_counted_by_its_reason(prepare, line, reason):
    """One row ends the job, is lost silently, or is kept incorrectly; its line is not named."""
    printed, meta = prepare(["", line, line, line, line])
    assert meta["dropped"] == {reason: 4}
    assert f"dropped 4: {reason} (line 2, 3, 4, ..)" in printed
    assert sum(split["rows"] for split in meta["splits"].values()) == 30


def test_rows_cannot_make_up_any_number_of_reasons(prepare):
    """Each bad row has a reason of its own, and a report has as many lines."""
    made_up = [{"messages": [{"role": f"r{i}", "content": "a"}]} for i in range(40)]
    printed, meta = prepare(made_up, fine=50)
    assert printed.count("\ndropped") < 40
    assert sum(meta["dropped"].values()) == 40 and meta["dropped"]["other reasons"] == 10


@pytest.mark.parametrize("fine, error", ((30, None), (29, "line 1: not JSON. 30 of 59 rows"),
                                         (0, "line 1: not JSON. 30 of 30 rows")))
def test_a_job_stops_only_if_most_rows_are_bad(prepare, fine, error):
    result = prepare(["{"] * 30, fine=fine)
    if error:
        assert error in result and len(result) < 300
    else:
        assert result[1]["read"] == 60


def test_a_question_that_is_asked_often_is_not_held_out_with_all_its_rows(prepare):
    """The split depends on the system prompt, or one question takes all rows out of training."""
    system = {"role": "system", "content": "Be brief."}
    asked = [{"messages": [system, *turns(f"q{i % 40}", "a")]} for i in range(200)]
    asked += [{"messages": turns("Hi", "a")}] * 100
    _, meta = prepare(asked, fine=0)
    assert meta["splits"]["val"]["rows"] == 30
    assert meta["splits"]["train"]["rows"] == 270


def test_no_question_is_in_both_splits(prepare, tmp_path):
    """The same question with two system prompts is trained on and held out; the split changes from
    one process to the next."""
    conversation = conversation_of({"messages": turns(" q\n", "a")})
    assert conversations.question_key(conversation) == 4110462503  # crc32 of "q"
    asked = []
    for i in range(300):
        system = {"role": "system", "content": ("Be brief.", "Be kind.")[i % 2]}
        asked.append({"messages": [system, *turns(f"question {i // 2}", "a")]})
    prepare(asked, fine=0)
    splits = []
    for name in ("train", "val"):
        samples = Samples(str(tmp_path / "samples"), name, 512, tokenizer_fingerprint(NANO_TARGET))
        texts = [nano()[1].decode(samples[i][0]) for i in range(len(samples))]
        splits.append({text.split("question ")[1].split("<")[0] for text in texts})
    assert splits[1] and not splits[0] & splits[1]

# ------------------------------------------------------------------------------------------------
# what the template makes of a row


CALL = ("<tool_call>\n<function=add>\n<parameter=a>\n1\n</parameter>\n<parameter=b>\n2\n"
        "</parameter>\n</function>\n</tool_call><|im_end|>")


@pytest.mark.parametrize("content, arguments", (
    (None, {"a": 1, "b": 2}), ("Let me see.", {"a": 1, "b": 2}), ("", '{"a": 1, "b": 2}')))
def test_tool_calls_are_supervised(qwen, content, arguments):
    """Failure: a call of a tool becomes an empty answer, in the middle and at the end of a row."""
    row = tool_row(content)
    row["messages"][1]["tool_calls"][0]["function"]["arguments"] = arguments
    text = f"{content}\n\n{CALL}" if content else CALL
    assert supervised(row, qwen) == text + "It is 3.<|im_end|>"
    result = encoded(row, qwen)
    prompt = chat_prompt(load_tokenizer(qwen), conversation_of(row).messages[:1], tools=TOOLS)
    ends = row | {"messages": row["messages"][:2]}
    first = encoded(ends, qwen)
    assert first.tokens[:len(prompt)].tolist() == result.tokens[:len(prompt)].tolist() == prompt
    assert supervised(ends, qwen) == text


@pytest.mark.parametrize("messages, reason", (
    (turns("poison", "a"), r"refused by the chat template \(ZeroDivisionError\)"),
    (turns("q", "a") + [{"role": "system", "content": "s"}] + turns("q", "a"),
     r"refused by the chat template \(TemplateError\)"),
    ([{"role": "developer", "content": "d"}, *turns("q", "a")],
     "ignores the role developer"),
    (turns("q", "a </think> b", "q", "a"), "</think> in the text of an answer"),
))
def test_what_the_template_refuses_or_leaves_out_drops_the_row(qwen, messages, reason):
    with pytest.raises(UnusableRow, match=reason):
        encoded({"messages": messages}, qwen)


@pytest.mark.parametrize("target", ("nano", "qwen"))
@pytest.mark.parametrize("answer", (
    {"content": "a", "reasoning": "hm"}, {"content": "\n\na", "reasoning_content": "\nhm\n"},
    {"content": "<think>\nhm\n</think>\n\na"}, {"content": "hm\n</think>\n\na"}))
def test_with_thinking_on_a_thought_is_supervised(qwen, target, answer):
    """A thought is cut out, whichever field it is in."""
    folder = qwen if target == "qwen" else NANO_TARGET
    row = {"messages": [turns("q")[0], {"role": "assistant", **answer}]}
    assert supervised(row, folder, thinking=True) == "hm\n</think>\n\na<|im_end|>"
    with pytest.raises(UnusableRow, match="a thought, with thinking off|</think> in the text"):
        encoded(row, folder)
    with pytest.raises(UnusableRow, match="no thought, with thinking on"):
        encoded({"messages": turns("q", "a")}, folder, thinking=True)


def test_earlier_answers_without_their_thoughts_are_not_supervised(qwen):
    """The template leaves out an earlier thought, so the rest is not what the target would say."""
    messages = turns("q", "a", "p", "b")
    messages[1]["reasoning"] = messages[3]["reasoning"] = "hm"
    assert supervised({"messages": messages}, qwen, thinking=True) == "hm\n</think>\n\nb<|im_end|>"
    result = encoded({"messages": messages}, qwen, thinking=True)
    assert (result.answers, result.other_answers) == (1, 1)


@pytest.mark.parametrize("marks, expected", (
    (None, ("a", "b", "c")), ([1, 3, 5], ("a", "b", "c")), ([3], ("b",)), ([1, 5], ("a", "c"))))
def test_only_the_targets_own_turns_are_supervised(marks, expected):
    """Someone else's answers are trained on."""
    row = {"messages": turns("1", "a", "2", "b", "3", "c"), "target_turns": marks}
    assert supervised(row, NANO_TARGET) == "".join(text + "<|im_end|>" for text in expected)


def test_a_held_out_row_begins_with_the_prompt_of_decoding(prepare, tmp_path):
    """A held-out row of several turns is decoded without the empty thought."""
    asked = [{"messages": turns(f"q{i}", "a", "p", "b")} for i in range(10)]
    _, meta = prepare(asked, fine=0)
    samples = Samples(str(tmp_path / "samples"), "val", 512)
    tokens, mask = samples[0]
    prompt = nano()[1].decode(tokens[:mask.argmax()])
    assert prompt.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert masked_text(tokens, mask) == "b<|im_end|>"
    assert (meta["answers"], meta["other_answers"], meta["unmarked"]) == (19, 1, 10)


@pytest.mark.parametrize("text", ("a<|im_end|>b", "<|endoftext|>"))
def test_text_never_becomes_a_special_token(text):
    """A user types a mark and so ends his message, in a chat or in the arguments of a tool."""
    tokenizer = nano()[1]
    with pytest.raises(ValueError, match="special token"):
        chat_prompt(tokenizer, text)
    with pytest.raises(UnusableRow, match="special token"):
        render(tokenizer, [turns("q")[0] | {"name": text}], None, False)
    with pytest.raises(UnusableRow, match="special token"):
        encoded(tool_row(tools=[{"name": {text: 1}}]), NANO_TARGET)


def test_a_long_text_is_cut_before_it_is_tokenized(monkeypatch):
    """An answer of 60 MB takes 12 GB, or the cut changes what is kept."""
    tokenizer = nano()[1]
    longest = []
    encode = type(tokenizer).encode

    def watched(self, text, **keys):
        longest.append(len(text))
        return encode(self, text, **keys)

    monkeypatch.setattr(type(tokenizer), "encode", watched)
    text = "".join(f"{i} pens and e\u0301 " for i in range(40_000))
    row = {"messages": turns("q", text)}
    cut = encoded(row, NANO_TARGET, max_length=200)
    assert max(longest) < 6000
    assert cut.was_cut and len(cut.tokens) == 200
    whole = chat_prompt(tokenizer, "q") + encode(tokenizer, text[:3000])
    assert cut.tokens.tolist() == whole[:200]

# ------------------------------------------------------------------------------------------------
# long jobs: progress, interruptions, workers that die


def start(script, *flags, tmp_path, code=""):
    """A process that runs a script of data/ after some lines of code."""
    program = f"import sys; sys.path.insert(0, {ROOT!r})\nfrom data import {script}\n{code}\n"
    # a process in the background of a shell ignores Ctrl-C
    program += "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    program += f"{script}.main({list(flags)!r})"
    return subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=tmp_path, env=os.environ | {"OMP_NUM_THREADS": "1"}, start_new_session=True)


DIE_AT_77 = """
import os
encode = conversations.encode
def dying(conversation, *args):
    if conversation.id == 77:
        os.abort()
    return encode(conversation, *args)
conversations.encode = dying
"""
MARK_BUSY = """
from pathlib import Path
encode = conversations.encode
def marking(*args):
    Path("busy").touch()
    return encode(*args)
conversations.encode = marking
"""


@pytest.mark.parametrize("how, error", (
    ("abort", "a process died, perhaps for lack of memory, with one of the rows at line 65 to 512"),
    ("Ctrl-C", "interrupted: nothing was kept, the same command starts again"),
    ("kill -9", None)))
def test_conversations_that_end_early(tmp_path, how, error):
    """A worker that dies leaves its parent waiting; Ctrl-C prints tracebacks or leaves files."""
    source = write_jsonl(tmp_path / "x.jsonl", [
        {"id": i, "messages": turns(f"q{i}", "a " * 400)} for i in range(800)])
    flags = (f"--source={source}", f"--target={NANO_TARGET}", f"--out_dir={tmp_path}/out",
             "--num_proc=2")
    process = start("conversations", *flags, tmp_path=tmp_path,
                    code=DIE_AT_77 if how == "abort" else MARK_BUSY)
    if how != "abort":
        while not (tmp_path / "busy").exists():  # the workers are at work
            time.sleep(0.01)
        if how == "Ctrl-C":
            os.killpg(process.pid, signal.SIGINT)  # a terminal sends it to the workers too
        else:
            process.kill()
    _, printed = process.communicate(timeout=120)
    if error:
        assert process.returncode == 1
        assert error in printed and printed.count("\n") == 1, printed
        assert not list((tmp_path / "out").iterdir())
    else:
        process = start("conversations", *flags, tmp_path=tmp_path)
        process.communicate(timeout=120)
        assert process.returncode == 0
        assert len(list((tmp_path / "out").iterdir())) == 7


def test_progress_without_a_terminal(monkeypatch, capsys):
    """A log shows nothing for hours, or not how long a job will take."""
    monkeypatch.setattr(rows, "PROGRESS_SECONDS", 0.05)
    for _ in rows.progress(range(8), "row", total=1000):
        time.sleep(0.03)
    line = capsys.readouterr().err.split("\n")[0]
    assert re.fullmatch("\r?[2-7] of 1000 rows in 00:00, 00:[0-9]{2} left", line)

# ------------------------------------------------------------------------------------------------
# data/regenerate.py against a server


class Server(http.server.BaseHTTPRequestHandler):
    """Answers with the number of messages; its class variables change how."""
    requests = []
    message = {}
    how = ""

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.requests.append(body)
        self.send_response(400 if self.how == "refusing" else 200)
        self.end_headers()
        if self.how == "refusing":
            self.wfile.write(HOSTILE.encode())
            return
        if self.how == "slow":
            for _ in range(20):
                self.wfile.write(b" ")
                threading.Event().wait(0.05)
            return
        if self.how == "deep" and body["messages"][0]["content"] == "p":
            self.wfile.write(DEEP.encode())
            return
        message = {"content": f"answer {len(body['messages'])}"} | self.message
        reason = "length" if self.how == "endless" else "stop"
        reply = {"choices": [{"message": message, "finish_reason": reason}]}
        self.wfile.write(json.dumps(reply).encode())

    def log_message(self, *args):
        pass


@pytest.fixture
def ask(main, monkeypatch, tmp_path):
    """ask(rows, how, message, *flags) runs data/regenerate.py against a Server. It returns what was
    printed, the rows of the output, and the requests."""
    monkeypatch.setattr(Server, "requests", [])
    monkeypatch.setattr(regenerate.time, "sleep", lambda seconds, sleep=time.sleep: sleep(0.01))

    def run(some, how="", message=None, *flags):
        monkeypatch.setattr(Server, "how", how)
        monkeypatch.setattr(Server, "message", message or {})
        source = write_jsonl(tmp_path / "prompts.jsonl", some)
        with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
            server.daemon_threads = True
            server.block_on_close = False
            server.handle_error = lambda request, address: None
            threading.Thread(target=server.serve_forever, daemon=True).start()
            printed = main(
                regenerate, f"--prompts={source}", f"--out={tmp_path}/out.jsonl", "--model=m",
                f"--server=http://127.0.0.1:{server.server_port}/v1", "--retries=1", *flags)
            server.shutdown()
        out = tmp_path / "out.jsonl"
        return printed, read_jsonl(out) if out.exists() else None, Server.requests
    return run


def test_regenerate_writes_every_answer_again(ask, prepare, qwen):
    """Only the last answer is the target's; a later answer follows someone else's; the tools, their
    results or the thought of the server are lost; a mark is missing."""
    greeting = {"role": "assistant", "content": "Hello!"}
    talk = [greeting, *turns("1", "other", "2", "other", "3")]
    some = [tool_row(), {"messages": talk}, "{"]
    printed, out, requests = ask(some, "", {"reasoning": "hm"})
    assert "dropped 1: not JSON (line 3)" in printed and "5 answered" in printed
    assert [row["target_turns"] for row in out] == [[1, 3], [2, 4, 6]]
    assert out[0]["tools"] == TOOLS
    assert [request["tools"] for request in requests if "tools" in request] == [TOOLS] * 2
    assert out[0]["messages"][2] == {"role": "tool", "content": "3"}
    answers = [row["messages"][turn] for row in out for turn in row["target_turns"]]
    assert {answer["reasoning_content"] for answer in answers} == {"hm"}
    for row, counts in zip(out, ((1, 3), (2, 4, 6))):
        texts = [row["messages"][turn]["content"] for turn in row["target_turns"]]
        assert texts == [f"answer {count}" for count in counts]
    assert out[1]["messages"][:2] == [greeting, turns("1")[0]]
    assert out[1]["messages"][:6] in [request["messages"] for request in requests]
    _, meta = prepare(out, "--thinking", target=qwen, fine=0)
    assert meta["dropped"] == {} and meta["unmarked"] == 0


@pytest.mark.parametrize("how, printed, count", (
    ("endless", "no answer ended, so there is no", 0),
    ("slow", "the last: refused: TimeoutError", 0),
    ("deep", "1 answered, 1 refused", 1)))
def test_regenerate_survives_its_server(ask, tmp_path, how, printed, count):
    """A byte now and then, an answer that Python cannot parse, or no end of any answer: the run
    waits forever, ends with an empty file, or cannot be repeated."""
    some = [{"question": "q"}, {"question": "p"}]
    message, out, _ = ask(some, how, None, "--timeout=0.3")
    assert printed in message
    assert len(out or []) == count
    assert not list(tmp_path.glob("out.jsonl.*"))
    if not count:
        assert "2 answered" in ask(some)[0]


def test_regenerate_bounds_a_reply(ask, monkeypatch):
    """A reply without end fills the memory."""
    monkeypatch.setattr(regenerate, "LONGEST_REPLY", 50)
    assert "more than 50 bytes" in ask([{"question": "q"}])[0]

HOSTILE = "\x1b[2J\u202e"


@pytest.mark.parametrize("what", ("name", "role", "template", "server"))
def test_escape_sequences_do_not_reach_the_terminal(ask, main, prepare, capsys, tmp_path, what):
    """A file name, a row, a template, or a server clears the screen or changes what it shows."""
    if what == "server":
        printed = ask([{"question": "q"}], "refusing")[0]
    elif what == "name":
        path = write_jsonl(tmp_path / f"{HOSTILE}.jsonl", ["{"])
        printed = main(regenerate, f"--prompts={path}", "--out=x")
        write_jsonl(tmp_path / "a.jsonl", [{"question": "q"}])
        regenerate.read_prompts(str(tmp_path))
        printed += capsys.readouterr().out
    elif what == "role":
        printed, _ = prepare([{"messages": [{"role": HOSTILE, "content": "a"}]}])
    else:
        target = nano_copy(tmp_path / "target", "target")
        target.joinpath("chat_template.jinja").write_text(
            f"{{{{ raise_exception('{HOSTILE}') }}}}")
        printed = prepare([], target=target)
    assert "x1b[2J" in printed
    assert "\x1b" not in printed and "\u202e" not in printed


def test_files_are_not_written_through_links(ask, prepare, tmp_path):
    """A link that somebody put into the folder directs the output to a different file."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    samples = tmp_path / "samples"
    samples.mkdir()
    for name in ("meta.json", "train.tokens.bin", "val.offsets.bin.tmp", "val.mask.bin.0.tmp"):
        (samples / name).symlink_to(victim)
    assert prepare([])[1]["read"] == 30
    (tmp_path / "out.jsonl.part").symlink_to(victim)
    assert "symbolic link" in ask([{"question": "q"}])[0]
    (tmp_path / "out.jsonl.part").unlink()
    (tmp_path / "out.jsonl.tmp").symlink_to(victim)
    assert "1 answered" in ask([{"question": "q"}])[0]
    assert victim.read_text() == "mine"

# ------------------------------------------------------------------------------------------------
# bench.py


def test_bench_measures_on_training_rows(run_bench, tmp_path, qwen):
    """System prompts, history and tools are left out of a prompt; one bad row ends the run; a
    known answer is not graded."""
    system = {"role": "system", "content": "Be brief."}
    (first, _), (second, _), *_ = answered()
    some = ["{", {"messages": [system, *turns(first, "a", second, "b")], "answer": "4"},
            tool_row(), {"question": first, "answer": "5"}, {"messages": turns("<|im_end|>", "a")},
            {"messages": turns(first, "a", second)}]
    path = write_jsonl(tmp_path / "rows.jsonl", some)
    tokenizer = load_tokenizer(qwen)
    config = bench_config(path, target=qwen)
    prompts = load_prompts(config, 9, nano()[0], tokenizer)
    assert [prompt.ids for prompt in prompts] == [
        chat_prompt(tokenizer, [system, *turns(first, "a", second)]),
        chat_prompt(tokenizer, conversation_of(tool_row()).messages[:3], tools=TOOLS),
        chat_prompt(tokenizer, first), chat_prompt(tokenizer, turns(first, "a", second))]
    assert [prompt.answer for prompt in prompts] == ["4", None, "5", None]
    assert len(load_prompts(config, 2, nano()[0], tokenizer)) == 2
    report = run_bench("acceptance", f"--prompts={path}", "--limit=1", "--max_new_tokens=9",
                       "--device=cpu", "--dtype=float32")
    assert report["prompts"] == 1 and report["accuracy"]["target"] == 0


def bench_config(path, target):
    class config:
        prompts = str(path)
        thinking = False
    config.target = target
    return config


@pytest.mark.parametrize("error", (ValueError, RecursionError, SystemExit))
def test_a_grader_that_fails_is_not_fatal(monkeypatch, error):
    """All answers are measured, and then one that the grader cannot read ends the run."""
    def fail(*args):
        raise error("cannot parse")

    monkeypatch.setattr(bench_prompts, "boxed", fail)
    assert is_correct("\\boxed{1}", "2") is NOT_GRADED


def test_a_hub_that_is_away_is_noticed_quickly(monkeypatch, tmp_path):
    """Without internet a name that is not cached takes 28 s to fail; or a proxy is not tried."""
    monkeypatch.setattr(rows.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(rows.constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    monkeypatch.setattr(checkpoint, "getproxies", dict)
    began = time.monotonic()
    for answer in (OSError("no network"), None):
        def lookup(*args, error=answer):
            if error:
                raise error
            threading.Event().wait()  # a name server that does not answer
        monkeypatch.setattr(socket, "getaddrinfo", lookup)
        checkpoint.hub_answers.cache_clear()
        with pytest.raises(ValueError, match="the hub does not give such .*.ConnectionError."):
            bench_prompts.load_questions("math500", 3)
    assert time.monotonic() - began < 4
