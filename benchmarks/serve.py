"""
Compares two OpenAI-compatible servers, one with a drafter and one without, as their users see them.

Each group of `concurrency` prompts goes to one server and then to the other, in alternating order
after a warm-up. A request's clock starts when it is sent, so its time includes the
prefill and the network. A request that fails is counted with its reason and is in no other figure.
The speedup and the fraction of equal texts are over the prompts that both servers answered.

tau is the server's own figure. vLLM counts drafts and accepted tokens on /metrics. SGLang reports
the mean length of all rounds since its start, avg_spec_accept_length, on /server_info (earlier
versions: /get_server_info). Both figures include the target's own token.
"""
import functools
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from benchmarks.common import setup_of, share, write_rows
from benchmarks.prompts import is_correct, load_questions, messages_of
from benchmarks.timing import alternating_order, progress

MODES = ("speculative", "baseline")
TIMEOUT = 600.0  # seconds until a request counts as failed
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


def run(config):
    if not config.base_url or not config.baseline_url or config.concurrency < 1:
        raise ValueError("give --base_url and --baseline_url, each up to /v1, "
                         "and --concurrency of at least 1")
    urls = {"speculative": config.base_url.rstrip("/"),
            "baseline": config.baseline_url.rstrip("/")}
    questions = load_questions(config.prompts, config.limit or 16)
    results = ask_in_turns(config, urls, [question for question, _ in questions])
    report = report_of(results, [answer for _, answer in questions])
    write_rows(config, "serve", [results])
    print_report(report)
    return report, setup_of(config, questions, ())


# ------------------------------------------------------------------------------------------------
# the client


def ask(url, body, question):
    """One answer: {"text", "tokens" as the server counts them, "seconds" since the request was
    sent}, or {"error": the reason}."""
    messages, tools = messages_of(question)
    body = body | {"messages": messages}
    if tools:
        body["tools"] = tools
    content = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/chat/completions", content, {"Content-Type": "application/json"})
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=TIMEOUT) as response:
            reply = json.load(response)
        seconds = time.perf_counter() - start
        choice = reply["choices"][0]
        text = choice["message"]["content"]
        tokens = reply["usage"]["completion_tokens"]
        if not text or choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"text {text!r}, finish_reason {choice['finish_reason']!r}")
        if not 1 <= tokens <= body["max_tokens"]:
            raise ValueError(f"{tokens} tokens in its usage; the limit is {body['max_tokens']}")
    except urllib.error.HTTPError as error:
        return {"error": f"status {error.code}"}
    except TimeoutError:
        return {"error": f"no answer within {TIMEOUT:g} s"}
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        return {"error": " ".join(reason.split())[:100]}
    return {"text": text, "tokens": tokens, "seconds": seconds}


def get(url):
    """The text at an address, or "" if there is none."""
    try:
        with urllib.request.urlopen(url, timeout=10) as response:
            return response.read().decode()
    except FAILURES:
        return ""


def first_model(url):
    """The first model that a server lists."""
    try:
        return json.loads(get(f"{url}/models"))["data"][0]["id"]
    except FAILURES:
        raise ValueError(f"{url} lists no model: is the server up, and does the address end in "
                         "/v1?") from None


def request_body(config, model):
    """A request in OpenAI's form, without its messages. The engines add chat_template_kwargs and
    top_k to that form."""
    body = {"model": model, "max_tokens": config.max_new_tokens, "seed": config.seed,
            "temperature": config.temperature, "top_p": config.top_p,
            "chat_template_kwargs": {"enable_thinking": config.thinking}}
    if config.top_k:
        body["top_k"] = config.top_k
    return body


# ------------------------------------------------------------------------------------------------
# groups of prompts, to one server and then to the other


def ask_in_turns(config, urls, questions):
    """{mode: {"answers": what ask() returned for each question, "groups": (tokens, seconds) of each
    group in which no request failed, "before" and "after": acceptance_so_far()}}."""
    results = {}
    bodies = {}
    for mode, url in urls.items():
        bodies[mode] = request_body(config, first_model(url))
        warm_up = ask(url, bodies[mode], questions[0])
        if "error" in warm_up:
            raise ValueError(f"the {mode} server {url} does not answer the first prompt: "
                             f"{warm_up['error']}")
        results[mode] = {"answers": [], "groups": [], "before": acceptance_so_far(url)}
    starts = range(0, len(questions), config.concurrency)
    with ThreadPoolExecutor(config.concurrency) as pool:
        for turn, first in enumerate(progress(starts, unit="group")):
            group = questions[first:first + config.concurrency]
            for mode in alternating_order(urls, turn):
                send = functools.partial(ask, urls[mode], bodies[mode])
                start = time.perf_counter()
                answers = list(pool.map(send, group))
                seconds = time.perf_counter() - start
                results[mode]["answers"] += answers
                if not any("error" in answer for answer in answers):
                    tokens = sum(answer["tokens"] for answer in answers)
                    results[mode]["groups"].append((tokens, seconds))
    for mode, url in urls.items():
        results[mode]["after"] = acceptance_so_far(url)
    return results


def acceptance_so_far(url):
    """A server's figures for its rounds until now: {"drafts", "accepted_tokens"}, {"mean"}, or {}
    if it reports none."""
    root = url.removesuffix("/v1")
    pattern = r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{.*\})? ([\d.e+]+)$"
    counts = Counter()
    for name, count in re.findall(pattern, get(f"{root}/metrics"), re.MULTILINE):
        counts[name] += float(count)  # summed over engines
    if counts:
        return dict(counts)
    text = get(f"{root}/server_info") or get(f"{root}/get_server_info")
    try:
        states = json.loads(text)["internal_states"]
        return {"mean": mean(state["avg_spec_accept_length"] for state in states)}
    except FAILURES:
        return {}


# ------------------------------------------------------------------------------------------------
# the report


def report_of(results, known_answers):
    """The figures of a report, from the results of ask_in_turns() and the known answers."""
    report = {"command": "serve", "prompts": len(known_answers)}
    for mode in MODES:
        report[mode] = figures_of(results[mode], known_answers)
    ours = []
    baseline = []
    for a, b in zip(*[results[mode]["answers"] for mode in MODES]):
        if "error" not in a and "error" not in b:
            ours.append(a)
            baseline.append(b)
    speedup = rate(ours) / rate(baseline) if ours else None
    same_text = share(a["text"] == b["text"] for a, b in zip(ours, baseline))
    return report | {"pairs": len(ours), "speedup": speedup, "same_text": same_text}


def figures_of(result, known_answers):
    """The figures of one server."""
    good = []
    verdicts = []
    errors = Counter()
    for answer, known in zip(result["answers"], known_answers, strict=True):
        if "error" in answer:
            errors[answer["error"]] += 1
            continue
        good.append(answer)
        if known is not None:
            verdicts.append(is_correct(answer["text"], known))
    figures = {"answered": len(good), "failed": errors.total(), "errors": dict(errors),
               "tau": tau_of(result), "accuracy": share(verdicts),
               "need_math_verify": verdicts.count(None)}
    if good:
        figures["s_per_request"] = mean(answer["seconds"] for answer in good)
        figures["tokens_per_s"] = rate(good)
    if result["groups"]:
        tokens, seconds = zip(*result["groups"])
        figures["throughput"] = sum(tokens) / sum(seconds)
    return figures


def rate(answers):
    """Tokens per second of a request."""
    tokens = sum(answer["tokens"] for answer in answers)
    return tokens / sum(answer["seconds"] for answer in answers)


def tau_of(result):
    """Tokens per round: vLLM's over these requests, SGLang's since its start, or None."""
    before = result["before"]
    after = result["after"]
    drafts = after.get("drafts", 0) - before.get("drafts", 0)
    if drafts > 0:
        return 1 + (after["accepted_tokens"] - before.get("accepted_tokens", 0)) / drafts
    return after.get("mean")


def print_report(report):
    for mode in MODES:
        for name, value in report[mode].items():
            if isinstance(value, float):
                value = f"{value:.3f}"
            print(f"{mode:12} {name:17} {value}")
    if report["speedup"]:
        print(f"speedup {report['speedup']:.2f}x over the {report['pairs']} prompts that both "
              f"servers answered; {report['same_text']:.1%} of them have equal texts")
