"""
Compares two OpenAI-compatible servers, one with a drafter and one without, as their users see them.

Each group of `concurrency` prompts goes to one server and then to the other, in alternating order
after a warm-up. The time of a group includes the prefill and the network. A request that fails is
counted with its reason. Throughput, speedup, and the fraction of equal texts are over the groups in
which no request failed on either server.

tau is the server's own figure. vLLM counts drafts and accepted tokens on /metrics. SGLang reports
the mean length of all rounds since its start, avg_spec_accept_length, on /server_info (earlier
versions: /get_server_info). Both figures include the target's own token.
"""
import functools
import http.client
import json
import re
import time
import urllib.request
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from statistics import mean

from benchmarks.common import print_table, setup_of, share, text_of, write_rows
from benchmarks.prompts import is_correct, load_questions, messages_of
from benchmarks.timing import alternating_order, progress
from data.regenerate import send
from data.rows import THOUGHTS, parse_json
from formats.files import one_line

MODES = ("speculative", "baseline")
COLUMNS = ("server", "answered", "failed", "errors", "tau", "accuracy", "throughput")
TIMEOUT = 600.0  # seconds until a whole request counts as failed
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


def run(config):
    if not config.base_url or not config.baseline_url:
        raise ValueError("give --base_url and --baseline_url, each up to /v1")
    urls = {"speculative": config.base_url.rstrip("/"),
            "baseline": config.baseline_url.rstrip("/")}
    questions = load_questions(config.prompts, config.limit or 16)
    results = ask_in_turns(config, urls, [question for question, _ in questions])
    report = report_of(results, [answer for _, answer in questions])
    write_rows(config, "serve", [results])
    print_table([{"server": mode} | report[mode] for mode in MODES], COLUMNS)
    print(f"speedup {text_of(report['speedup'])}, {report['faster']} of {report['groups']} groups "
          f"faster, fraction of equal texts {text_of(report['same_text'])}")
    return report, setup_of(config, questions)


# ------------------------------------------------------------------------------------------------
# the client


def ask(url, body, question):
    """One answer: {"text", "tokens" as the server counts them}, or {"error": the reason}."""
    messages, tools = messages_of(question)
    body = body | {"messages": messages}
    if tools:
        body["tools"] = tools
    content = json.dumps(body).encode()
    request = urllib.request.Request(
        f"{url}/chat/completions", content, {"Content-Type": "application/json"})
    try:
        status, content = send(request, TIMEOUT)
        if status != 200:
            raise ValueError(f"status {status}")
        reply = parse_json(content)
        choice = reply["choices"][0]
        text = text_of_message(choice["message"])
        tokens = reply["usage"]["completion_tokens"]
        if not text or choice["finish_reason"] not in ("stop", "length"):
            raise ValueError(f"text {text!r}, finish_reason {choice['finish_reason']!r}")
        if not 1 <= tokens <= body["max_tokens"]:
            raise ValueError(f"{tokens} tokens in its usage; the limit is {body['max_tokens']}")
    except FAILURES as error:
        return {"error": one_line(repr(error), 100)}
    return {"text": text, "tokens": tokens}


def text_of_message(message):
    """A message's text. A server can have moved its beginning, the reasoning, to another key."""
    parts = []
    for key in (*THOUGHTS, "content"):
        part = message.get(key)
        if part and part not in parts:  # some servers give the reasoning under two keys
            parts.append(part)
    return "".join(parts)


def get(url):
    """The text at an address, or "" if there is none."""
    try:
        status, content = send(urllib.request.Request(url), 10)
        return content.decode() if status == 200 else ""
    except FAILURES:
        return ""


def request_body(config, url):
    """A request in OpenAI's form, without its messages, for the first model that a server lists.
    The engines add chat_template_kwargs and top_k to that form."""
    try:
        model = parse_json(get(f"{url}/models"))["data"][0]["id"]
    except FAILURES:
        raise ValueError(f"{url} lists no model: is the server up, and does the address end in "
                         "/v1?") from None
    body = {"model": model, "max_tokens": config.max_new_tokens, "seed": config.seed,
            "temperature": config.temperature, "top_p": config.top_p,
            "chat_template_kwargs": {"enable_thinking": config.thinking}}
    if config.top_k:  # 0 means all, which servers write in other ways
        body["top_k"] = config.top_k
    return body


def acceptance_so_far(url):
    """A server's figures for its rounds until now: {"drafts", "accepted_tokens"}, {"mean"}, or {}
    if it reports none."""
    root = url.removesuffix("/v1")
    pattern = r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{.*\})? ([\d.e+]+)$"
    try:
        counts = Counter()
        for name, count in re.findall(pattern, get(f"{root}/metrics"), re.MULTILINE):
            counts[name] += float(count)  # summed over engines
        if counts:
            return dict(counts)
        text = get(f"{root}/server_info") or get(f"{root}/get_server_info")
        states = parse_json(text)["internal_states"]
        return {"mean": mean(state["avg_spec_accept_length"] for state in states)}
    except FAILURES:
        return {}


# ------------------------------------------------------------------------------------------------
# groups of prompts, to one server and then to the other


def ask_in_turns(config, urls, questions):
    """{mode: {"groups": those of ask_group(), "before" and "after": acceptance_so_far()}}."""
    results = {}
    bodies = {}
    for mode, url in urls.items():
        bodies[mode] = request_body(config, url)
        warm_up = ask(url, bodies[mode], questions[0])
        if "error" in warm_up:
            raise ValueError(f"the {mode} server {url} does not answer the first prompt: "
                             f"{warm_up['error']}")
        results[mode] = {"groups": [], "before": acceptance_so_far(url)}
    starts = range(0, len(questions), config.concurrency)
    for turn, first in enumerate(progress(starts, unit="group")):
        group = questions[first:first + config.concurrency]
        for mode in alternating_order(urls, turn):
            results[mode]["groups"].append(ask_group(urls[mode], bodies[mode], group))
    for mode, url in urls.items():
        results[mode]["after"] = acceptance_so_far(url)
    return results


def ask_group(url, body, questions):
    """Ask all at once: {"answers", "seconds", "tokens": of all, or None if a request failed}."""
    start = time.perf_counter()
    with ThreadPoolExecutor(len(questions)) as pool:
        answers = list(pool.map(functools.partial(ask, url, body), questions))
    seconds = time.perf_counter() - start
    tokens = None
    if not any("error" in answer for answer in answers):
        tokens = sum(answer["tokens"] for answer in answers)
    return {"answers": answers, "seconds": seconds, "tokens": tokens}


def report_of(results, known_answers):
    """The figures of a report, from the results of ask_in_turns() and the known answers."""
    report = {"command": "serve", "prompts": len(known_answers), "speedup": None}
    for mode in MODES:
        report[mode] = figures_of(results[mode], known_answers)
    pairs = []  # of groups in which no request failed
    is_equal = []
    for ours, theirs in zip(*[results[mode]["groups"] for mode in MODES]):
        if ours["tokens"] and theirs["tokens"]:
            pairs.append((ours, theirs))
            texts = zip(ours["answers"], theirs["answers"])
            is_equal += [a["text"] == b["text"] for a, b in texts]
    for mode, groups in zip(MODES, zip(*pairs)):
        report[mode]["throughput"] = throughput(groups)
    if pairs:
        ratio = report["speculative"]["throughput"] / report["baseline"]["throughput"]
        report["speedup"] = ratio
    faster = sum(throughput([ours]) > throughput([theirs]) for ours, theirs in pairs)
    return report | {"groups": len(pairs), "faster": faster, "same_text": share(is_equal)}


def throughput(groups):
    """Tokens per second of all requests at once."""
    return sum(group["tokens"] for group in groups) / sum(group["seconds"] for group in groups)


def figures_of(result, known_answers):
    """The figures of one server. accuracy is None if math-verify is needed and not installed."""
    verdicts = []
    errors = Counter()
    answers = sum([group["answers"] for group in result["groups"]], [])
    for answer, known in zip(answers, known_answers, strict=True):
        if "error" in answer:
            errors[answer["error"]] += 1
        elif known is not None:
            verdicts.append(is_correct(answer["text"], known))
    return {"answered": len(answers) - errors.total(), "failed": errors.total(),
            "errors": dict(errors), "tau": tau_of(result), "accuracy": share(verdicts)}


def tau_of(result):
    """Tokens per round: vLLM's over these requests, SGLang's since its start, or None."""
    before = Counter(result["before"])
    after = Counter(result["after"])
    drafts = after["drafts"] - before["drafts"]
    if drafts > 0:
        return 1 + (after["accepted_tokens"] - before["accepted_tokens"]) / drafts
    return result["after"].get("mean")
