"""bench.py serve: failures of a server that become figures, of it or of the other one."""
import contextlib
import http.server
import json
import threading
import time
import urllib.request

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bench
from benchmarks import serve
from tokenizer import chat_prompt, stop_ids, tokenizer_fingerprint
from checkpoint import load_target
from configurator import configure
from data.nano import nested
from data.nano.problems import boxed, problems
from draft_decode import timed_generate
from tests.common import NANO_TARGET, nano, read_jsonl, shipped, write_jsonl

ONE_CHUNK = b'data: {"choices": [{"delta": {"content": "4"}}]}\n\n'
NO_USAGE = b'data: {"choices": [{"delta": {"content": "4"}, "finish_reason": "stop"}]}\n\n'
BROKEN_STREAMS = {
    "cut": ONE_CHUNK,
    "garbage": b"data: {nonsense\n\n",
    "number": b"data: 7\n\n",
    "html": b"<html>It works</html>",
    "error": b'data: {"error": "full"}\n\n',
    "countless": NO_USAGE,
}
FAULTS = ["busy", "dead", "slow", *BROKEN_STREAMS]


class BrokenServer(http.server.BaseHTTPRequestHandler):
    """Passes a request on to `upstream`, but a prompt that names a fault meets that fault.

    Its /metrics are vLLM's: a request has a round of 4 tokens, and one of 2 in another engine."""
    upstream = ""
    requests = 0

    def do_GET(self):
        if self.path != "/metrics":
            self.reply(b"[]")
            return
        text = ""
        for name, engine, count in (("drafts", 0, 1), ("drafts", 1, 1),
                                    ("accepted_tokens", 0, 3), ("accepted_tokens", 1, 1)):
            total = count * BrokenServer.requests
            text += f'vllm:spec_decode_num_{name}_total{{engine="{engine}"}} {total}.0\n'
        self.reply(text.encode())

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        question = json.loads(body)["messages"][0]["content"]
        BrokenServer.requests += 1
        if question in BROKEN_STREAMS:
            self.reply(BROKEN_STREAMS[question])
        elif question == "busy":
            self.send_error(503)
        elif question == "dead":
            self.close_connection = True
        elif question == "slow":
            self.trickle()
        else:
            self.pass_on(body)

    def reply(self, content):
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def trickle(self):
        """A lively stream that does not end in time."""
        self.send_response(200)
        self.end_headers()
        with contextlib.suppress(OSError):
            for _ in range(20):
                self.wfile.write(ONE_CHUNK)
                time.sleep(0.4)

    def pass_on(self, body):
        url = self.upstream + self.path.removeprefix("/v1")
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(url, body, headers)
        with urllib.request.urlopen(request) as answer:
            self.reply(answer.read())

    def log_message(self, *args):
        pass


def test_bench_serve(run_bench, monkeypatch, served, tmp_path):
    """A server's failures averaged into its speed or accuracy, or counted for the other; an answer
    that is not the target's. Both arms are one real server, one of them behind a server that fails
    in every way there is."""
    by_length = sorted(problems("test", 30, task="words"), key=lambda problem: len(problem[1]))
    good = by_length[:2]
    rows = [{"question": question, "answer": answer} for question, _, answer in good]
    rows += [{"question": fault, "answer": "1"} for fault in FAULTS]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    args = ["serve", f"--prompts={prompts}", f"--served_model={NANO_TARGET}", "--limit=99",
            "--max_new_tokens=72", f"--baseline_url={served}", "--concurrency=2", "--timeout=5"]
    monkeypatch.setattr(BrokenServer, "upstream", served)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), BrokenServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        report = run_bench(*args, f"--base_url=http://127.0.0.1:{server.server_port}/v1/")
        server.shutdown()

    # every failure is counted, with its reason, for the server that failed
    ours = report["speculative"]
    baseline = report["baseline"]
    assert ours["answered"] == report["pairs"] == 2
    assert ours["failed"] == sum(ours["errors"].values()) == len(FAULTS)
    assert len(ours["errors"]) == len(FAULTS)
    assert {"status 503", "no end within 5 s"} < set(ours["errors"])
    assert baseline["failed"] == 0
    assert baseline["answered"] == len(rows)

    # all figures are those of the two good prompts
    lines = read_jsonl(tmp_path / "serve.jsonl")
    counted = [line for line in lines if "error" not in line["speculative"]]
    assert [line["prompt"] for line in counted] == [0, 1]
    check_figures(report, counted)
    right = count_right_answers([line["baseline"] for line in counted], good)
    assert ours["accuracy"]["value"] == right / 2 >= 0.5

    for url, hint in (("http://127.0.0.1:9/v1", "the speculative server .* does not answer"),
                      ("", "give --base_url")):
        with pytest.raises(SystemExit, match=hint):
            run_bench(*args, f"--base_url={url}")


def check_figures(report, counted):
    """The report's figures follow from the lines of the prompts that both servers answered."""
    ours = report["speculative"]
    our_answers = [line["speculative"] for line in counted]
    baseline_answers = [line["baseline"] for line in counted]
    assert report["agreement"]["value"] == 1
    assert ours["tokens_per_s_of_all"]["value"] > 0
    assert report["tau"] == 3
    assert "counters" in ours["tau_source"]
    assert report["baseline"]["tau"] is None
    speedup = report["speedup"]
    assert speedup["value"] == pytest.approx(speed(our_answers) / speed(baseline_answers))
    assert speedup["low"] <= speedup["value"] <= speedup["high"]
    first = [answer["first"] for answer in our_answers]
    assert ours["first_token_s"]["value"] == pytest.approx(sum(first) / 2)
    for answer in our_answers + baseline_answers:
        assert 0 < answer["first"] <= answer["seconds"]


def count_right_answers(answers, asked):
    """How many answers are right; all of them must be the target's own. asked: the problems."""
    target, tokenizer = nano()
    right = 0
    for answer, (question, _, known) in zip(answers, asked, strict=True):
        ids = chat_prompt(tokenizer, question)
        tokens = timed_generate(target, shipped(), ids, 72, stop_ids(tokenizer)).tokens
        assert answer["text"].lstrip() == tokenizer.decode(tokens, skip_special_tokens=True)
        right += boxed(answer["text"]) == known
    return right


def speed(answers):
    """Tokens a second of some answers together."""
    tokens = sum(answer["tokens"] for answer in answers)
    return tokens / sum(answer["seconds"] for answer in answers)


def test_bench_serve_resumes(run_bench, monkeypatch, served, tmp_path):
    """Groups asked twice, or lost, after an interruption."""
    args = ["serve", f"--served_model={NANO_TARGET}", "--limit=3", "--max_new_tokens=8",
            f"--base_url={served}", f"--baseline_url={served}"]
    questions_asked = []
    ask = serve.ask

    def until(count):
        def count_and_ask(url, body, timeout):
            questions_asked.append(body["messages"][0]["content"])
            if len(questions_asked) > count:
                raise KeyboardInterrupt
            return ask(url, body, timeout)
        return count_and_ask

    # two of warm-up, the first prompt, and half of the second
    monkeypatch.setattr(serve, "ask", until(2 + 3))
    with pytest.raises(SystemExit, match="interrupted"):
        run_bench(*args)
    assert len(read_jsonl(tmp_path / "serve.part.jsonl")) == 2

    questions_asked.clear()
    monkeypatch.setattr(serve, "ask", until(99))
    report = run_bench(*args, "--resume")
    assert len(questions_asked) == 2 + 4
    assert report["pairs"] == report["prompts"] == 3
    assert report["agreement"]["value"] == 1


def test_bench_serve_requests_have_its_keys():
    """A key of sampling, thinking or the limit that does not arrive at the server."""
    config = configure(vars(bench), [])
    plain = serve.request_body(config)
    assert "top_k" not in plain  # 0 is all, which servers write in other ways
    assert plain["chat_template_kwargs"] == {"enable_thinking": False}
    for key, value in (("max_new_tokens", 7), ("temperature", 0.7), ("top_k", 5), ("top_p", 0.9),
                       ("seed", 3), ("thinking", True)):
        setattr(config, key, value)
    assert serve.request_body(config) == {
        "max_tokens": 7, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3, "stream": True,
        "stream_options": {"include_usage": True},
        "chat_template_kwargs": {"enable_thinking": True}}


@pytest.mark.parametrize("tokens, is_whole", ((0, False), (1, True), (7, True), (8, False),
                                              (None, False)))
def test_bench_serve_refuses_answers_that_are_not_whole(tokens, is_whole):
    """An answer of exactly the limit that counts as failed; one that is longer, or that has no
    count, in the figures."""
    answer = serve.StreamedAnswer("4", tokens, 0.5, "length")
    if is_whole:
        serve.check_answer(answer, 7)
        return
    with pytest.raises(ValueError, match="tokens in its usage"):
        serve.check_answer(answer, 7)


def test_bench_serve_report_by_hand(capsys):
    """The inverse of a speedup, its arithmetic mean, pairs in which one server failed; a first
    token that counts among those after it; seconds printed as milliseconds."""
    def answer(text, tokens, seconds):
        return {"text": text, "tokens": tokens, "first": 1.0, "seconds": seconds}

    def row(ours, baseline):
        group = {"wall": 10.0, "before": {}, "after": {}}
        return {"speculative": group | {"answers": [ours]},
                "baseline": group | {"answers": [baseline]}}

    rows = [
        row(answer("a", 9, 3.0), answer("a", 9, 9.0)),      # 3 tokens/s against 1
        row(answer("b", 6, 4.0), answer("c", 8, 4.0)),      # 1.5 against 2
        row(answer("d", 9, 3.0), answer("d", 6, 6.0)),      # 3 against 1
        row(answer("e", 5, 5.0), {"error": "dead"})]
    report = serve.report_of(rows, [None] * 4)
    assert (report["prompts"], report["pairs"], report["faster"]) == (4, 3, 2)
    assert (report["min"], report["median"], report["max"]) == (0.75, 3.0, 3.0)
    assert report["geomean"]["value"] == pytest.approx((3 * 0.75 * 3) ** (1 / 3))
    assert report["speedup"]["value"] == pytest.approx((24 / 10) / (23 / 19))
    assert report["agreement"]["value"] == pytest.approx(2 / 3)
    ours = report["speculative"]
    assert ours["first_token_s"]["value"] == 1.0
    assert ours["token_s"]["value"] == pytest.approx((2 + 3 + 2 + 4) / (8 + 5 + 8 + 4))
    assert ours["tokens_per_s"]["value"] == pytest.approx(29 / 15)
    assert ours["tokens_per_s_of_all"]["value"] == pytest.approx(29 / 40)

    serve.print_report(report | {"tau": 4.5})
    lines = {}
    for line in capsys.readouterr().out.splitlines():
        lines[line[:28].strip()] = line[28:].strip()
    for name, value in (("ms to the first token", "1000.00"), ("ms a token after it", "440.00"),
                        ("tokens/s of a request", "1.93"), ("tokens/s of all", "0.72")):
        assert lines[name].split()[0] == value, name
    assert lines["tau"].split()[0] == "4.500,"
    assert lines["speedup"].startswith("1.98 [")
    assert "a prompt 0.75x to 3.00x, geometric mean 1.89 [" in lines["speedup"]
    assert lines["speedup"].endswith("2 faster")
    assert lines["agreement"].startswith("66.67 [")
    assert lines["baseline"] == "3 answered, 1 failed; 1 x dead"


def test_bench_serve_figures(monkeypatch):
    """A tau without the target's own token, or of other requests; an interval that is none."""
    pages = {
        "/metrics": "vllm:spec_decode_num_drafts_created 1.7e9\n",
        "/get_server_info": json.dumps({"internal_states": [{"avg_spec_accept_length": 5.25}]})}

    def get(url, timeout):
        return pages.get(url.removeprefix("http://x"), "")

    monkeypatch.setattr(serve, "get", get)
    assert serve.acceptance_so_far("http://x/v1", 1) == {"mean": 5.25}  # SGLang

    answer = {"text": "\\boxed{7}", "tokens": 5, "first": 1.0, "seconds": 3.0}
    mean = {"before": {}, "after": {"mean": 5.25}}
    rows = [{"answers": [answer, answer], "wall": 4.0} | mean,
            {"answers": [answer, {"error": "dead"}], "wall": 600.0} | mean]
    figures = serve.arm_figures(rows, ["7"] * 4)
    assert figures["answered"] == 3
    assert figures["tau"] == 5.25
    assert figures["tau_source"] == "the server's mean since its start"
    assert figures["tokens_per_s_of_all"]["value"] == 10 / 4
    assert figures["token_s"]["value"] == 2 / 4
    assert figures["accuracy"]["value"] == 1
    for key in ("value", "low", "high"):
        assert figures["tokens_per_s"][key] == pytest.approx(5 / 3)

    pages["/metrics"] = (
        'vllm:spec_decode_num_drafts_total{model_name="a b",engine="0"} 1.2e+02\n'
        'vllm:spec_decode_num_accepted_tokens_total{model_name="a b",engine="0"} 480.0\n')
    counters = serve.acceptance_so_far("http://x/v1", 1)
    assert counters == {"drafts": 120, "accepted": 480}
    rows = [{"before": {"drafts": 20, "accepted": 80}, "after": counters}]
    assert serve.tau_of(rows) == (5.0, "the server's counters over these requests")

    x = np.random.default_rng(1).normal(10, 2, 400)
    interval = serve.estimate(serve.mean, x)  # by the normal distribution: mean +- 1.96 * 2 / 20
    assert interval["low"] == pytest.approx(x.mean() - 0.196, abs=0.03)
    assert interval["high"] == pytest.approx(x.mean() + 0.196, abs=0.03)

# ------------------------------------------------------------------------------------------------
# the target as engines read it


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
