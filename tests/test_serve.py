"""bench.py serve: a server's failures that end up in figures, of this server or of the other."""
import contextlib
import http.server
import json
import threading
import time
import urllib.request

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bench
from benchmarks import common, serve
from checkpoint import load_target
from configurator import configure
from data import regenerate
from data.nano import nested
from data.nano.problems import boxed, problems
from draft_decode import collect, generate
from tests.common import NANO_TARGET, nano, read_jsonl, shipped, write_jsonl
from tokenizer import chat_prompt, stop_ids, tokenizer_fingerprint


def reply_of(text="4", tokens=1, reason="stop"):
    choice = {"message": {"content": text}, "finish_reason": reason}
    return {"choices": [choice], "usage": {"completion_tokens": tokens}}


BROKEN_REPLIES = {
    "garbage": "{nonsense",
    "deep": "[" * 100_000,
    "number": "7",
    "cut": json.dumps(reply_of(reason=None)),
    "empty": json.dumps(reply_of(text="")),
    "countless": json.dumps(reply_of() | {"usage": None}),
    "too long": json.dumps(reply_of(tokens=73)),
    "no tokens": json.dumps(reply_of(tokens=0)),
}
FAULTS = ["busy", "dead", *BROKEN_REPLIES]


class BrokenServer(http.server.BaseHTTPRequestHandler):
    """Passes requests on to `upstream`, but a prompt that names a fault gets that fault."""
    upstream = ""

    def do_GET(self):
        if self.path == "/v1/models":
            self.pass_on()
        else:
            self.reply("[]")

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)["messages"][0]["content"]
        if question in BROKEN_REPLIES:
            self.reply(BROKEN_REPLIES[question])
        elif question == "busy":
            self.send_error(503)
        elif question == "dead":
            self.close_connection = True
        elif question == "drip":  # never longer than 0.1 s without a byte
            self.reply("")
            for _ in range(20):
                self.wfile.write(b" ")
                time.sleep(0.1)
        else:
            self.pass_on(body)

    def reply(self, text):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def pass_on(self, body=None):
        url = self.upstream + self.path.removeprefix("/v1")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request) as answer:
            self.reply(answer.read().decode())

    def log_message(self, *args):
        pass


@contextlib.contextmanager
def broken_server():
    """Yields the address of a BrokenServer."""
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BrokenServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/v1"
        server.shutdown()


@pytest.mark.parametrize("question, error", (
    ("drip", "no whole answer in 0.5 s"), ("cut", "more than 50 bytes")))
def test_bench_serve_bounds_a_request(monkeypatch, question, error):
    """A server that sends a byte now and then is never given up, or one that never stops sending
    fills the memory."""
    monkeypatch.setattr(serve, "TIMEOUT", 0.5)
    monkeypatch.setattr(regenerate, "LONGEST_REPLY", 50)
    with broken_server() as url:
        assert error in serve.ask(url, {"max_tokens": 1}, question)["error"]


def test_bench_serve_reads_and_prints_text(monkeypatch, capsys):
    """Reasoning that a server keeps apart is an empty answer, or is not compared; a server's escape
    sequence reaches the terminal."""
    message = {"reasoning": "2 + 2", "reasoning_content": "2 + 2", "content": None}
    assert serve.text_of_message(message) == "2 + 2"
    assert serve.text_of_message(message | {"content": "= 4"}) == "2 + 2= 4"
    monkeypatch.setattr(serve, "send", lambda request, seconds: (200, json.dumps(
        reply_of(reason="\x1b[2J")).encode()))
    error = serve.ask("http://x", {"max_tokens": 9}, "q")["error"]
    common.print_table([{"errors": {error: 1, "\x1b]0;": 2}}], ["errors"])
    printed = capsys.readouterr().out
    assert "x1b[2J" in error and "x1b]0;" in printed and "\x1b" not in error + printed


def test_bench_serve(run_bench, monkeypatch, served, tmp_path):
    """A server's failures averaged into its speed or accuracy, or counted for the other server; a
    text that is not the target's. Both are one real server, one of them behind a server that fails
    in many ways."""
    by_length = sorted(problems("test", 30, task="words"), key=lambda problem: len(problem[1]))
    good = by_length[:2]
    rows = [{"question": question, "answer": answer} for question, _, answer in good]
    rows += [{"question": fault, "answer": "1"} for fault in FAULTS]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    args = ["serve", f"--prompts={prompts}", "--limit=99", "--max_new_tokens=72",
            f"--baseline_url={served}", "--concurrency=2"]
    monkeypatch.setattr(BrokenServer, "upstream", served)
    with broken_server() as url:
        report = run_bench(*args, f"--base_url={url}/")

    # each failure is counted with its reason, for the server that failed
    ours = report["speculative"]
    baseline = report["baseline"]
    assert ours["answered"] == 2
    assert report["groups"] == 1
    assert ours["failed"] == sum(ours["errors"].values()) == len(FAULTS)
    assert len(ours["errors"]) == len(FAULTS)
    for reason in ("status 503", "nested too deeply"):
        assert any(reason in error for error in ours["errors"]), reason
    assert baseline["failed"] == 0
    assert baseline["answered"] == len(rows)

    # the figures are those of the two good prompts
    results, = read_jsonl(tmp_path / "serve.jsonl")
    right = 0
    target, tokenizer = nano()
    for number, (question, _, known) in enumerate(good):
        text = results["speculative"]["groups"][0]["answers"][number]["text"]
        ids = chat_prompt(tokenizer, question)
        answer = generate(
            target, shipped(), ids, max_new_tokens=72, stop_token_ids=stop_ids(tokenizer))
        tokens = collect(answer).tokens
        assert text.lstrip() == tokenizer.decode(tokens, skip_special_tokens=True)
        right += boxed(text) == known
    assert ours["accuracy"] == right / 2 >= 0.5
    assert report["same_text"] == 1
    assert report["speedup"] > 0
    assert ours["throughput"] > 0
    assert ours["tau"] is None

    for url, hint in (("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 lists no model"),
                      ("", "give --base_url")):
        with pytest.raises(SystemExit, match=hint):
            run_bench(*args, f"--base_url={url}")


def test_bench_serve_requests_have_its_keys(monkeypatch):
    """A key for sampling, thinking or the limit that does not arrive at the server."""
    monkeypatch.setattr(serve, "get", lambda url: '{"data": [{"id": "m"}]}')
    plain = serve.request_body(configure(vars(bench), []), "url")
    assert "top_k" not in plain  # 0 means all, which servers write in other ways
    assert plain["chat_template_kwargs"] == {"enable_thinking": False}
    config = configure(vars(bench), ["--max_new_tokens=7", "--temperature=0.7", "--top_k=5",
                                     "--top_p=0.9", "--seed=3", "--thinking"])
    assert serve.request_body(config, "url") == {
        "model": "m", "max_tokens": 7, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3,
        "chat_template_kwargs": {"enable_thinking": True}}


def test_bench_serve_groups_take_turns(monkeypatch):
    """A server that is always asked first; more requests at once than the concurrency; a group with
    a failed request in the throughput; a prompt that is asked twice or never; a tau of the
    warm-up."""
    asked = []

    def ask(url, body, question):
        asked.append((url, question))
        if question == "q4" and url == "a":
            return {"error": "dead"}
        return {"text": question, "tokens": 4}

    now = iter(range(0, 1000, 2))  # each group takes 2 s
    monkeypatch.setattr(serve, "ask", ask)
    monkeypatch.setattr(serve, "get", lambda url: '{"data": [{"id": "m"}]}')
    monkeypatch.setattr(serve, "acceptance_so_far", lambda url: len(asked))
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(now))
    config = configure(vars(bench), ["--concurrency=2"])
    questions = [f"q{number}" for number in range(5)]
    results = serve.ask_in_turns(config, {"speculative": "a", "baseline": "b"}, questions)
    groups = [(asked[first][0], {question for _, question in asked[first:first + 2]})
              for first in (2, 4, 6)]
    assert groups == [("b", {"q0", "q1"}), ("a", {"q0", "q1"}), ("a", {"q2", "q3"})]
    assert [url for url, _ in asked[10:]] == ["b", "a"]
    for mode, before, tokens in (("speculative", 1, [8, 8, None]), ("baseline", 2, [8, 8, 4])):
        assert (results[mode]["before"], results[mode]["after"]) == (before, 12)
        groups = results[mode]["groups"]
        assert [group["tokens"] for group in groups] == tokens
        assert [group["seconds"] for group in groups] == [2, 2, 2]
    answers = sum([group["answers"] for group in results["baseline"]["groups"]], [])
    assert [answer["text"] for answer in answers] == questions


def test_bench_serve_report_by_hand():
    """The inverse of a speedup, a mean of ratios, groups with a failure; figures swapped."""
    def group(seconds, *answers):
        answers = [{"text": text, "tokens": tokens} for text, tokens in answers]
        tokens = sum(answer["tokens"] for answer in answers)
        return {"answers": answers, "seconds": seconds, "tokens": tokens}

    def result(*groups):
        return {"groups": list(groups), "before": {}, "after": {"mean": 5.25}}

    dead = {"answers": [{"error": "dead"}], "seconds": 1.0, "tokens": None}
    results = {
        "speculative": result(group(3.0, ("a", 9), ("\\boxed{7}", 6)), group(5.0, ("d", 9)),
                              group(6.0, ("e", 5))),
        "baseline": result(group(9.0, ("a", 9), ("c", 8)), group(4.0, ("d", 9)), dead)}
    report = serve.report_of(results, [None, "7", None, None])
    assert (report["prompts"], report["groups"], report["faster"]) == (4, 2, 1)
    assert report["speedup"] == pytest.approx((24 / 8) / (26 / 13))
    assert report["same_text"] == pytest.approx(2 / 3)
    assert report["speculative"] == {
        "answered": 4, "failed": 0, "errors": {}, "tau": 5.25, "accuracy": 1, "throughput": 3.0}
    assert report["baseline"] == {
        "answered": 3, "failed": 1, "errors": {"dead": 1}, "tau": 5.25, "accuracy": 0,
        "throughput": 2.0}
    assert serve.report_of({mode: result(dead) for mode in serve.MODES}, ["7"])["speedup"] is None


def test_bench_serve_tau(monkeypatch):
    """A tau without the target's own token, or of earlier requests."""
    pages = {"/metrics": "vllm:spec_decode_num_drafts_created 1.7e9\n"}
    monkeypatch.setattr(serve, "get", lambda url: pages.get(url.removeprefix("http://x"), ""))
    assert serve.acceptance_so_far("http://x/v1") == {}
    states = [{"avg_spec_accept_length": 5.0}, {"avg_spec_accept_length": 5.5}]
    pages["/get_server_info"] = json.dumps({"internal_states": states})  # SGLang
    assert serve.acceptance_so_far("http://x/v1") == {"mean": 5.25}

    pages["/metrics"] = (  # vLLM
        'vllm:spec_decode_num_drafts_total{model_name="a b",engine="0"} 1.2e+02\n'
        'vllm:spec_decode_num_accepted_tokens_total{model_name="a b",engine="0"} 480.0\n')
    after = serve.acceptance_so_far("http://x/v1")
    assert after == {"drafts": 120, "accepted_tokens": 480}
    before = {"drafts": 20, "accepted_tokens": 80}
    assert serve.tau_of({"before": before, "after": after}) == 5.0


def test_nested_target_is_the_same_target(main, tmp_path):
    """A folder for SGLang that has other weights, another template or other stop ids, or lacks what
    SGLang reads: the interval of full layers, eos and tie at the top, a tower."""
    folder = str(tmp_path / "nested")
    assert main(nested, f"--out_dir={folder}").endswith(f"wrote {folder}\n")
    flat = load_target(NANO_TARGET)
    same = load_target(folder)
    assert same.config == flat.config
    for name, weight in flat.state_dict().items():
        assert torch.equal(same.state_dict()[name], weight), name
    assert tokenizer_fingerprint(folder) == tokenizer_fingerprint(NANO_TARGET)

    config = AutoConfig.from_pretrained(folder)
    assert config.architectures == ["Qwen3_5ForConditionalGeneration"]
    assert config.eos_token_id == 504
    assert config.tie_word_embeddings
    assert config.vision_config.depth == 1
    assert config.vision_config.out_hidden_size == config.text_config.hidden_size
    interval = config.text_config.full_attention_interval
    for i, kind in enumerate(config.text_config.layer_types):
        assert (kind == "full_attention") == ((i + 1) % interval == 0)

    # other people's loaders
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("How many pens?").input_ids])
    published = AutoModelForCausalLM.from_pretrained(NANO_TARGET, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, published(ids).logits)

    assert "nested form already" in main(nested, f"--target={folder}")
    assert "no config.json" in main(nested, f"--target={tmp_path}")
