"""bench.py serve: a server's failures that end up in figures, of this server or of the other."""
import json
from types import SimpleNamespace

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import bench
from benchmarks import common, serve
from checkpoint import load_target
from configurator import configure
from data.nano import nested
from data.nano.problems import boxed, problems
from draft_decode import collect, generate
from tests.common import NANO_TARGET, nano, read_jsonl, shipped, write_jsonl
from tokenizer import chat_prompt, stop_ids, tokenizer_fingerprint


def reply_of(message, tokens=1, reason="stop"):
    return json.dumps({"choices": [{"message": message, "finish_reason": reason}],
                       "usage": {"completion_tokens": tokens}})


FAULTS = {
    "busy": (503, ""),
    "garbage": (200, "{nonsense"),
    "deep": (200, "[" * 100_000),
    "number": (200, "7"),
    "cut": (200, reply_of({"content": "4"}, reason=None)),
    "empty": (200, reply_of({"content": ""})),
    "not text": (200, reply_of({"content": 4})),
    "too long": (200, reply_of({"content": "4"}, tokens=73)),
    "no tokens": (200, reply_of({"content": "4"}, tokens=0)),
    "dead": (200, None),
}


def test_bench_serve_reads_and_prints_text(monkeypatch, capsys):
    """Reasoning that a server keeps apart is an empty answer, or is not compared; a server's escape
    sequence reaches the terminal; a server that never ends its answer is never given up."""
    def ask(message, reason="stop"):
        def send(request, seconds):
            assert seconds == serve.TIMEOUT
            return 200, reply_of(message, reason=reason).encode()
        monkeypatch.setattr(serve, "send", send)
        return serve.ask("http://x", {"max_tokens": 9}, "q")

    thought = {"reasoning": "2 + 2", "reasoning_content": "2 + 2", "content": None}
    assert ask(thought)["text"] == "2 + 2"
    assert ask(thought | {"content": "= 4"})["text"] == "2 + 2= 4"
    error = ask({"content": "4"}, "\x1b[2J")["error"]
    common.print_table([{"errors": {error: 1, "\x1b]0;": 2}}], ["errors"])
    printed = capsys.readouterr().out
    assert "x1b[2J" in error and "x1b]0;" in printed and "\x1b" not in error + printed


def test_bench_serve(run_bench, monkeypatch, served, tmp_path):
    """A server's failures averaged into its speed or accuracy, or counted for the other server; a
    text that is not the target's. Both are one real server; the first one fails in many ways."""
    def send(request, seconds):
        if request.data and request.full_url.startswith(url):
            question = json.loads(request.data)["messages"][0]["content"]
            if question in FAULTS:
                status, text = FAULTS[question]
                return status, text.encode()
        return real_send(request, seconds)

    by_length = sorted(problems("test", 30, task="words"), key=lambda problem: len(problem[1]))
    good = by_length[:2]
    rows = [{"question": question, "answer": answer} for question, _, answer in good]
    rows += [{"question": fault, "answer": "1"} for fault in FAULTS]
    prompts = write_jsonl(tmp_path / "prompts.jsonl", rows)
    args = ["serve", f"--prompts={prompts}", "--limit=99", "--max_new_tokens=72",
            f"--baseline_url={served}", "--concurrency=2"]
    real_send = serve.send
    monkeypatch.setattr(serve, "send", send)
    url = served.replace("127.0.0.1", "localhost")
    report = run_bench(*args, f"--base_url={url}/")

    # each failure is counted with its reason, for the server that failed
    errors = report["speculative"]["errors"]
    assert report["groups"] == 1
    assert sum(errors.values()) == len(errors) == len(FAULTS)
    assert any("status 503" in error for error in errors)
    assert report["baseline"]["errors"] == {}

    # the figures are those of the two good prompts
    results, *_ = read_jsonl(tmp_path / "serve.jsonl")
    right = 0
    target, tokenizer = nano()
    for (question, _, known), answer in zip(good, results["speculative"]["answers"]):
        outputs = generate(target, shipped(), chat_prompt(tokenizer, question), max_new_tokens=72,
                           stop_token_ids=stop_ids(tokenizer))
        tokens = collect(outputs).tokens
        assert answer["text"].lstrip() == tokenizer.decode(tokens, skip_special_tokens=True)
        right += boxed(answer["text"]) == known
    assert report["speculative"]["accuracy"] == right / 2 >= 0.5
    assert report["same_text"] == 1
    assert report["speedup"] > 0

    for url, hint in (("http://127.0.0.1:9/v1", "http://127.0.0.1:9/v1 lists no model"),
                      ("", "give --base_url")):
        with pytest.raises(SystemExit, match=hint):
            run_bench(*args, f"--base_url={url}")


def test_bench_serve_requests_have_its_keys(monkeypatch):
    """A key for sampling, thinking or the limit that does not arrive at the server."""
    monkeypatch.setattr(serve, "fetch", lambda url: '{"data": [{"id": "m"}]}')
    plain = serve.request_body(configure(vars(bench), []), "url")
    assert "top_k" not in plain  # 0 means all, which servers write in other ways
    assert plain["chat_template_kwargs"] == {"enable_thinking": False}
    config = configure(vars(bench), ["--max_new_tokens=7", "--temperature=0.7", "--top_k=5",
                                     "--top_p=0.9", "--seed=3", "--thinking"])
    assert serve.request_body(config, "url") == {
        "model": "m", "max_tokens": 7, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "seed": 3,
        "chat_template_kwargs": {"enable_thinking": True}}


def test_bench_serve_groups_take_turns(monkeypatch):
    """A server that is always asked first; more requests at once than the concurrency; a prompt
    that is asked twice or never; a tau of the warm-up."""
    asked = []

    def ask(url, body, question):
        asked.append((url, question))
        return {"text": question, "tokens": 4}

    now = iter(range(0, 1000, 2))  # each group takes 2 s
    monkeypatch.setattr(serve, "ask", ask)
    monkeypatch.setattr(serve, "request_body", lambda config, url: {})
    monkeypatch.setattr(serve, "vllm_counts", lambda url: len(asked))
    monkeypatch.setattr(serve, "tau_of", lambda url, before: (before, len(asked)))
    monkeypatch.setattr(serve.time, "perf_counter", lambda: next(now))
    questions = [(f"q{number}", f"{number}") for number in range(5)]
    rows, taus = serve.ask_in_turns(
        SimpleNamespace(concurrency=2), {"speculative": "a", "baseline": "b"}, questions)
    groups = [(asked[first][0], {question for _, question in asked[first:first + 2]})
              for first in (2, 4, 6)]
    assert groups == [("b", {"q0", "q1"}), ("a", {"q0", "q1"}), ("a", {"q2", "q3"})]
    assert [url for url, _ in asked[10:]] == ["b", "a"]
    assert taus == {"speculative": (1, 12), "baseline": (2, 12)}
    for mode in serve.MODES:
        assert [row[mode]["seconds"] for row in rows] == [2, 2, 2]
        answers = sum([row[mode]["answers"] for row in rows], [])
        assert [answer["text"] for answer in answers] == [question for question, _ in questions]
    assert sum([row["known"] for row in rows], []) == ["0", "1", "2", "3", "4"]


def test_bench_serve_report_by_hand():
    """The inverse of a speedup, a mean of ratios, groups with a failure; figures swapped."""
    def group(seconds, *answers):
        answers = [{"text": text, "tokens": tokens} for text, tokens in answers]
        return {"answers": answers, "seconds": seconds}

    dead = {"answers": [{"error": "dead"}], "seconds": 1.0}
    rows = [{"known": [None, "7"], "speculative": group(3.0, ("a", 9), ("\\boxed{7}", 6)),
             "baseline": group(9.0, ("a", 9), ("c", 8))},
            {"known": [None], "speculative": group(5.0, ("d", 9)),
             "baseline": group(10.0, ("d", 9))},
            {"known": ["7"], "speculative": group(6.0, ("e", 5)), "baseline": dead}]
    assert serve.report_of(rows, {"speculative": 5.25, "baseline": None}) == {
        "groups": 2, "faster": 2, "speedup": pytest.approx((24 / 8) / (26 / 19)),
        "same_text": pytest.approx(2 / 3),
        "speculative": {"errors": {}, "tau": 5.25, "accuracy": 1, "throughput": 3.0,
                        "seconds_per_group": 4.0},
        "baseline": {"errors": {"dead": 1}, "tau": None, "accuracy": 0, "throughput": 26 / 19,
                     "seconds_per_group": 9.5}}
    with pytest.raises(ValueError, match="in each group of prompts a request failed.*dead"):
        serve.report_of(rows[2:], {})


def test_bench_serve_tau(monkeypatch):
    """A tau without the target's own token, or of earlier requests."""
    def fetch(url):
        return pages[url.removeprefix("http://x/")]

    pages = {"metrics": "vllm:spec_decode_num_drafts_created 1.7e9\n"}
    monkeypatch.setattr(serve, "fetch", fetch)
    before = serve.vllm_counts("http://x/v1")
    assert serve.tau_of("http://x/v1", before) is None
    states = [{"avg_spec_accept_length": 5.0}, {"avg_spec_accept_length": 5.5}]
    pages["get_server_info"] = json.dumps({"internal_states": states})  # SGLang
    assert serve.tau_of("http://x/v1", before) == 5.25

    page = ('vllm:spec_decode_num_drafts_total{{model_name="a b",engine="0"}} {}\n'
            'vllm:spec_decode_num_accepted_tokens_total{{model_name="a b",engine="0"}} {}\n')
    pages["metrics"] = page.format("20.0", "80.0")  # vLLM
    before = serve.vllm_counts("http://x/v1")
    pages["metrics"] = page.format("1.2e+02", "480.0")
    assert serve.tau_of("http://x/v1", before) == 5.0


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
    text = config.text_config
    assert config.architectures == ["Qwen3_5ForConditionalGeneration"]
    assert (config.eos_token_id, config.tie_word_embeddings) == (504, True)
    vision = config.vision_config
    assert (vision.depth, vision.out_hidden_size) == (1, text.hidden_size)
    for i, kind in enumerate(text.layer_types, 1):
        assert (kind == "full_attention") == (i % text.full_attention_interval == 0)

    # other people's loaders
    ids = torch.tensor([AutoTokenizer.from_pretrained(folder)("How many pens?").input_ids])
    published = AutoModelForCausalLM.from_pretrained(NANO_TARGET, dtype=torch.float32)
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(loaded(ids).logits, published(ids).logits)

    assert "nested form already" in main(nested, f"--target={folder}")
    assert "no config.json" in main(nested, f"--target={tmp_path}")
