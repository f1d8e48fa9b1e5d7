"""
Compares two OpenAI-compatible servers, one with a drafter and one without, as their users see them.

Each group of `concurrency` prompts goes to one server and then to the other, in alternating order
after a warm-up. Its time includes the prefill and the network. A request that fails is counted with
its reason, and its group is left out of all figures of both servers.

tau is the server's own figure. vLLM counts drafts and accepted tokens on /metrics. SGLang reports
the mean length of all rounds since its start, avg_spec_accept_length, on /server_info (earlier
versions: /get_server_info). Both figures include the target's own token.
"""
import contextlib
import functools
import json
import re
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from benchmarks.common import print_table, write_rows
from benchmarks.prompts import fraction_correct, load_questions, messages_of
from benchmarks.timing import alternating_order, progress
from data.regenerate import send
from formats.files import one_line

MODES = ("speculative", "baseline")
COLUMNS = ("server", "errors", "tau", "accuracy", "throughput", "seconds_per_group")
TIMEOUT = 600.0  # seconds until a whole request counts as failed
VLLM_COUNTER = r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{.*\})? ([\d.e+]+)$"


def run(config):
    if not config.base_url or not config.baseline_url:
        raise ValueError("give --base_url and --baseline_url, each up to /v1")
    urls = {"speculative": config.base_url.rstrip("/"),
            "baseline": config.baseline_url.rstrip("/")}
    questions = load_questions(config.prompts, config.limit or 16)
    rows, taus = ask_in_turns(config, urls, questions)
    report = report_of(rows, taus)
    write_rows(config, "serve", rows)
    print_table([{"server": mode} | report[mode] for mode in MODES], COLUMNS)
    print(f"speedup {report['speedup']:.2f}, {report['faster']} of {report['groups']} groups "
          f"faster, fraction of equal texts {report['same_text']:.3f}")
    return report


def fetch(url, body=None, seconds=10):
    """The text at an address. With a body, which becomes JSON, the request is a POST."""
    content = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, content, {"Content-Type": "application/json"})
    status, reply = send(request, seconds)
    if status != 200:
        raise ValueError(f"status {status}")
    return reply.decode()


def request_body(config, url):
    """A request in OpenAI's form, without its messages, for the first model that a server lists.
    The engines add chat_template_kwargs and top_k to that form."""
    try:
        model = json.loads(fetch(f"{url}/models"))["data"][0]["id"]
    except Exception:
        raise ValueError(f"{url} lists no model: is the server up, and does the address end in "
                         "/v1?") from None
    body = {"model": model, "max_tokens": config.max_new_tokens, "seed": config.seed,
            "temperature": config.temperature, "top_p": config.top_p,
            "chat_template_kwargs": {"enable_thinking": config.thinking}}
    if config.top_k:  # 0 means all, which servers write differently
        body["top_k"] = config.top_k
    return body


def ask(url, body, question):
    """{"text", "tokens" as the server counts them}, or {"error": the reason}."""
    messages, tools = messages_of(question)
    body = body | {"messages": messages}
    if tools:
        body["tools"] = tools
    try:
        reply = json.loads(fetch(f"{url}/chat/completions", body, TIMEOUT))
        choice = reply["choices"][0]
        message = choice["message"]
        # a server can have moved the beginning of the text, the reasoning, to another key
        thought = message.get("reasoning_content") or message.get("reasoning") or ""
        text = thought + (message.get("content") or "")
        tokens = reply["usage"]["completion_tokens"]
        if not text or choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"text {text!r}, finish_reason {choice['finish_reason']!r}")
        if not 1 <= tokens <= body["max_tokens"]:
            raise ValueError(f"{tokens} tokens in its usage; the limit is {body['max_tokens']}")
    except Exception as error:  # a server can send anything
        return {"error": one_line(repr(error), 100)}
    return {"text": text, "tokens": tokens}


def vllm_counts(url):
    """vLLM's number of drafts and of accepted_tokens since its start, summed over its engines. Both
    are 0 for other servers."""
    counts = Counter()
    with contextlib.suppress(Exception):
        metrics = fetch(f"{url.removesuffix('/v1')}/metrics")
        for name, count in re.findall(VLLM_COUNTER, metrics, re.MULTILINE):
            counts[name] += float(count)
    return counts


def tau_of(url, before):
    """Tokens per round: vLLM's since it gave the counts `before`, SGLang's since its start, or
    None."""
    after = vllm_counts(url)
    drafts = after["drafts"] - before["drafts"]
    if drafts > 0:
        return 1 + (after["accepted_tokens"] - before["accepted_tokens"]) / drafts
    for page in ("server_info", "get_server_info"):
        with contextlib.suppress(Exception):
            states = json.loads(fetch(f"{url.removesuffix('/v1')}/{page}"))["internal_states"]
            return mean(state["avg_spec_accept_length"] for state in states)
    return None


def ask_in_turns(config, urls, questions):
    """([{"known": answers, mode: {"answers", "seconds"}} of each group], {mode: tau})."""
    bodies = {}
    before = {}
    for mode, url in urls.items():
        bodies[mode] = request_body(config, url)
        warm_up = ask(url, bodies[mode], questions[0][0])
        if "error" in warm_up:
            raise ValueError(f"the {mode} server {url} does not answer the first prompt: "
                             f"{warm_up['error']}")
        before[mode] = vllm_counts(url)
    rows = []
    starts = range(0, len(questions), config.concurrency)
    for turn, first in enumerate(progress(starts, unit="group")):
        group, known = zip(*questions[first:first + config.concurrency])
        row = {"known": list(known)}
        for mode in alternating_order(urls, turn):
            start = time.perf_counter()
            with ThreadPoolExecutor(config.concurrency) as pool:
                ask_one = functools.partial(ask, urls[mode], bodies[mode])
                answers = list(pool.map(ask_one, group))
            row[mode] = {"answers": answers, "seconds": time.perf_counter() - start}
        rows.append(row)
    return rows, {mode: tau_of(urls[mode], before[mode]) for mode in urls}


def report_of(rows, taus):
    """The figures of a report, from the results of ask_in_turns()."""
    errors = {mode: Counter() for mode in MODES}
    whole = []  # groups in which no request failed
    for row in rows:
        failed = 0
        for mode in MODES:
            reasons = [answer["error"] for answer in row[mode]["answers"] if "error" in answer]
            errors[mode].update(reasons)
            failed += len(reasons)
        if failed == 0:
            whole.append(row)
    if not whole:
        raise ValueError(f"in each group of prompts a request failed: {errors}")
    report = {"groups": len(whole)}
    known_answers = sum([row["known"] for row in whole], [])
    texts = {}
    for mode in MODES:
        answers = sum([row[mode]["answers"] for row in whole], [])
        texts[mode] = [answer["text"] for answer in answers]
        report[mode] = {
            "errors": errors[mode], "tau": taus[mode],
            "accuracy": fraction_correct(texts[mode], known_answers),
            "throughput": throughput(whole, mode),
            "seconds_per_group": mean(row[mode]["seconds"] for row in whole)}
    speedups = [throughput([row], "speculative") / throughput([row], "baseline") for row in whole]
    is_equal = [a == b for a, b in zip(texts["speculative"], texts["baseline"])]
    return report | {
        "speedup": report["speculative"]["throughput"] / report["baseline"]["throughput"],
        "faster": sum(speedup > 1 for speedup in speedups),
        "same_text": sum(is_equal) / len(is_equal)}


def throughput(rows, mode):
    """Tokens per second of all requests at once."""
    tokens = 0
    for row in rows:
        tokens += sum(answer["tokens"] for answer in row[mode]["answers"])
    return tokens / sum(row[mode]["seconds"] for row in rows)
