"""
Two OpenAI-compatible servers, one with a drafter and one without, as their users see them.

Each group of `concurrency` prompts goes to one server, then to the other, in alternating order;
requests stream, and their clocks start when they are sent. A request that fails in any way is
counted with its reason and is in no figure of speed, accuracy or agreement; a pair counts where
both answered.

tau is what the server says of itself. vLLM counts drafts and accepted tokens on /metrics. SGLang
has the mean length of all rounds since it started, avg_spec_accept_length, on /server_info
(before: /get_server_info). Both count the target's own token in. Other servers report nothing.
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
from statistics import median
from typing import NamedTuple

import numpy as np

from benchmarks.common import setup_of
from benchmarks.journal import Journal
from benchmarks.prompts import Prompt, is_correct, load_questions
from benchmarks.timing import in_turn, progress

ARMS = ("speculative", "baseline")
FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)


class Server(NamedTuple):
    url: str     # up to /v1
    model: str   # the target's name there


def run(config):
    check(config)
    questions = load_questions(config.prompts, config.limit or 16)
    servers = {}
    for arm, url in zip(ARMS, (config.base_url, config.baseline_url)):
        url = url.rstrip("/")
        model = config.served_model or first_model(url, config.timeout)
        servers[arm] = Server(url, model)
    setup = serve_setup(config, questions, servers)
    journal = Journal(config, "serve", setup)
    rows = ask_in_turns(config, servers, [question for question, _ in questions], journal)
    report = report_of(rows, [answer for _, answer in questions])
    journal.close(prompt_rows(rows))
    print_report(report)
    print_method(config, len(questions))
    return report, setup


def check(config):
    complete = config.base_url and config.baseline_url
    if not complete or config.concurrency < 1 or config.timeout <= 0:
        raise ValueError("give --base_url and --baseline_url, each up to /v1, "
                         "and concurrency and timeout above 0")


def serve_setup(config, questions, servers):
    prompts = [Prompt(question, answer) for question, answer in questions]  # no ids: the text
    setup = setup_of(config, prompts, ())
    return setup | {
        "stops": "the servers'", "target": [server.model for server in servers.values()],
        "drafter": config.base_url, "device": "servers", "dtype": "servers",
        "baseline_url": config.baseline_url, "concurrency": config.concurrency}


# ------------------------------------------------------------------------------------------------
# the client


def ask(url, body, timeout):
    """One streamed answer: {"text", "tokens", "first", "seconds"}, both times since the request
    was sent, or {"error": why}. timeout: seconds until it must have ended, however lively the
    stream is.
    """
    headers = {"Content-Type": "application/json"}
    content = json.dumps(body).encode()
    request = urllib.request.Request(f"{url}/chat/completions", content, headers)
    start = time.perf_counter()
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            answer = read_stream(response, start, timeout)
        seconds = time.perf_counter() - start
        check_answer(answer, body["max_tokens"])
    except urllib.error.HTTPError as error:
        return {"error": f"status {error.code}"}
    except TimeoutError:
        return {"error": f"no end within {timeout:g} s"}
    except FAILURES as error:
        reason = f"{type(error).__name__}: {error}"
        return {"error": " ".join(reason.split())[:200]}
    return {"text": answer.text, "tokens": answer.tokens, "first": answer.first,
            "seconds": seconds}


class StreamedAnswer(NamedTuple):
    text: str
    tokens: int | None          # by the server's count
    first: float | None         # seconds to the first text, thoughts included
    finish_reason: str | None


def read_stream(response, start, timeout):
    """Reads server-sent events to their end: lines "data: {JSON}", the last one "data: [DONE]"."""
    text = ""
    tokens = None
    first = None
    finish_reason = None
    for line in response:
        if time.perf_counter() - start > timeout:
            raise TimeoutError
        if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
            continue
        chunk = json.loads(line[5:])
        if "error" in chunk:
            raise ValueError(f"error in the stream: {chunk['error']}")
        if chunk.get("usage"):
            tokens = chunk["usage"].get("completion_tokens")
        for choice in chunk["choices"]:
            delta = choice["delta"]
            new_text = delta.get("content") or ""
            finish_reason = choice.get("finish_reason") or finish_reason
            if first is None and (new_text or delta.get("reasoning_content")):
                first = time.perf_counter() - start
            text += new_text
    return StreamedAnswer(text, tokens, first, finish_reason)


def check_answer(answer, max_tokens):
    """ValueError for an answer that is not whole."""
    if not answer.text:
        raise ValueError("no text")
    if answer.finish_reason not in ("stop", "length"):
        raise ValueError(f"ended with finish_reason {answer.finish_reason!r}")
    if not isinstance(answer.tokens, int) or not 1 <= answer.tokens <= max_tokens:
        raise ValueError(f"{answer.tokens!r} tokens in its usage, asked for {max_tokens} at most")


def get(url, timeout):
    """The text at an address; "" where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=min(timeout, 10)) as response:
            return response.read().decode()
    except FAILURES:
        return ""


def first_model(url, timeout):
    """The first model that a server lists. ValueError when it lists none."""
    try:
        return json.loads(get(f"{url}/models", timeout))["data"][0]["id"]
    except FAILURES:
        raise ValueError(f"{url} lists no model: is it up, and does the address end in /v1? "
                         "else give --served_model and see") from None


def acceptance_so_far(url, timeout):
    """What a server says of its rounds until now: {"drafts", "accepted"}, or {"mean"}, or {}."""
    root = url.removesuffix("/v1")
    counts = vllm_counts(get(f"{root}/metrics", timeout))
    if counts:
        return {"drafts": counts["drafts"], "accepted": counts["accepted_tokens"]}
    text = get(f"{root}/server_info", timeout) or get(f"{root}/get_server_info", timeout)
    try:
        states = json.loads(text)["internal_states"]
        means = [state["avg_spec_accept_length"] for state in states]
        return {"mean": sum(means) / len(means)}
    except (*FAILURES, ZeroDivisionError):
        return {}


def vllm_counts(metrics):
    """vLLM's counters of drafts and accepted_tokens, added over its engines."""
    pattern = r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{.*\})? ([\d.e+]+)$"
    counts = Counter()
    for name, count in re.findall(pattern, metrics, re.MULTILINE):
        counts[name] += float(count)
    return counts


# ------------------------------------------------------------------------------------------------
# groups of prompts, to one server and then to the other


def ask_in_turns(config, servers, questions, journal):
    """One row a group of prompts: {arm: {"answers": [ask()'s], "wall": seconds, "before", "after":
    acceptance_so_far()'s}}. ValueError when a server does not answer the first prompt."""
    body = request_body(config)

    def send(arm, question):
        messages = [{"role": "user", "content": question}]
        request = body | {"model": servers[arm].model, "messages": messages}
        return ask(servers[arm].url, request, config.timeout)

    for arm, server in servers.items():  # the warm-up
        reason = send(arm, questions[0]).get("error")
        if reason:
            raise ValueError(f"the {arm} server {server.url} does not answer the first prompt "
                             f"({reason}): is it up, and does the address end in /v1?")
    groups = []
    for first in range(0, len(questions), config.concurrency):
        groups.append(questions[first:first + config.concurrency])

    with ThreadPoolExecutor(config.concurrency) as pool:
        def measure(number):
            row = {}
            for arm in in_turn(servers, number):
                before = acceptance_so_far(servers[arm].url, config.timeout)
                start = time.perf_counter()
                answers = list(pool.map(functools.partial(send, arm), groups[number]))
                wall = time.perf_counter() - start
                after = acceptance_so_far(servers[arm].url, config.timeout)
                row[arm] = {"answers": answers, "wall": wall, "before": before, "after": after}
            return row

        rows = []
        for number in progress(range(len(groups)), unit="group"):
            rows.append(journal.row(number, functools.partial(measure, number)))
    return rows


def request_body(config):
    """What all requests say, in OpenAI's form; the last three keys are in both engines' only."""
    body = {"max_tokens": config.max_new_tokens, "temperature": config.temperature, "stream": True,
            "seed": config.seed, "top_p": config.top_p, "stream_options": {"include_usage": True},
            "chat_template_kwargs": {"enable_thinking": config.thinking}}
    if config.top_k:
        body["top_k"] = config.top_k
    return body


def answers_of(rows, arm):
    """The answers of a server in the order of the prompts."""
    answers = []
    for row in rows:
        answers += row[arm]["answers"]
    return answers


def prompt_rows(rows):
    """A row for each prompt, with both servers' answers."""
    lines = []
    pairs = zip(answers_of(rows, "speculative"), answers_of(rows, "baseline"))
    for number, (ours, baseline) in enumerate(pairs):
        lines.append({"prompt": number, "speculative": ours, "baseline": baseline})
    return lines


# ------------------------------------------------------------------------------------------------
# figures


def estimate(statistic, *columns):
    """{"value", "low", "high"}: a statistic of columns (n,) and its 95 % interval, from 1,000
    samples of prompts with replacement (percentile bootstrap: Efron, Annals of Statistics 7, 1979).
    The statistic works along the last axis. None where it is unknown."""
    columns = [np.asarray(column, float) for column in columns]
    n = len(columns[0])
    if n == 0:
        return {"value": None, "low": None, "high": None}
    value = float(statistic(*columns))
    if n == 1:
        return {"value": value, "low": None, "high": None}
    chosen = np.random.default_rng(0).integers(n, size=(1000, n))
    samples = [column[chosen] for column in columns]
    with np.errstate(divide="ignore", invalid="ignore"):
        low, high = np.nanpercentile(statistic(*samples), (2.5, 97.5)).tolist()
    return {"value": value, "low": low, "high": high}


def mean(x):
    return x.mean(-1)


def geometric_mean(x):
    return np.exp(np.log(x).mean(-1))


def ratio(a, b):
    return a.sum(-1) / b.sum(-1)


def ratio_of_speeds(tokens, seconds, other_tokens, other_seconds):
    return ratio(tokens, seconds) / ratio(other_tokens, other_seconds)


def report_of(rows, known_answers):
    """The report's figures from the rows of ask_in_turns and the known answers (None: unknown)."""
    report = {"command": "serve", "prompts": len(known_answers)}
    for arm in ARMS:
        report[arm] = arm_figures([row[arm] for row in rows], known_answers)
    pairs = []
    for row in prompt_rows(rows):
        if "error" not in row["speculative"] and "error" not in row["baseline"]:
            pairs.append((row["speculative"], row["baseline"]))
    ours = [pair[0] for pair in pairs]
    baseline = [pair[1] for pair in pairs]
    gains = [speed_of(a) / speed_of(b) for a, b in pairs]
    return report | {
        "pairs": len(pairs), "tau": report["speculative"]["tau"],
        "speedup": estimate(ratio_of_speeds, column(ours, "tokens"), column(ours, "seconds"),
                            column(baseline, "tokens"), column(baseline, "seconds")),
        "geomean": estimate(geometric_mean, gains), "faster": sum(gain > 1 for gain in gains),
        "min": min(gains, default=None), "median": median(gains) if gains else None,
        "max": max(gains, default=None),
        "agreement": estimate(mean, [a["text"] == b["text"] for a, b in pairs])}


def column(answers, key):
    return [answer[key] for answer in answers]


def speed_of(answer):
    return answer["tokens"] / answer["seconds"]


def arm_figures(rows, known_answers):
    """Figures of one server, from its parts of the rows and the known answers."""
    answers = []
    for row in rows:
        answers += row["answers"]
    good = [answer for answer in answers if "error" not in answer]
    errors = Counter(answer["error"] for answer in answers if "error" in answer)
    first = [answer["first"] for answer in good if answer["first"]]
    # the time of a token after the first one
    later = [answer for answer in good if answer["tokens"] > 1 and answer["first"]]
    later_seconds = [answer["seconds"] - answer["first"] for answer in later]
    later_tokens = [answer["tokens"] - 1 for answer in later]
    # all requests at once: groups in which none failed
    group_tokens = []
    group_seconds = []
    for row in rows:
        if not any("error" in answer for answer in row["answers"]):
            group_tokens.append(sum(column(row["answers"], "tokens")))
            group_seconds.append(row["wall"])
    tau, tau_source = tau_of(rows)
    return {
        "answered": len(good), "failed": len(answers) - len(good), "errors": errors,
        "first_token_s": estimate(mean, first),
        "token_s": estimate(ratio, later_seconds, later_tokens),
        "tokens_per_s": estimate(ratio, column(good, "tokens"), column(good, "seconds")),
        "tokens_per_s_of_all": estimate(ratio, group_tokens, group_seconds),
        "tau": tau, "tau_source": tau_source} | accuracy_of(answers, known_answers)


def accuracy_of(answers, known_answers):
    """The estimate of the accuracy, unknown if answers remain that only math-verify could compare,
    and the number of those."""
    verdicts = []
    for answer, known in zip(answers, known_answers):
        if "error" not in answer and known is not None:
            verdicts.append(is_correct(answer["text"], known))
    unknown = verdicts.count(None)
    return {"accuracy": estimate(mean, [] if unknown else verdicts), "need_math_verify": unknown}


def tau_of(rows):
    """(tokens a round, how that is known), by what the server said before and after each row."""
    drafts = 0
    accepted = 0
    for row in rows:
        drafts += row["after"].get("drafts", 0) - row["before"].get("drafts", 0)
        accepted += row["after"].get("accepted", 0) - row["before"].get("accepted", 0)
    if drafts > 0:
        return 1 + accepted / drafts, "the server's counters over these requests"
    last = rows[-1]["after"].get("mean")
    if last:
        return last, "the server's mean since its start"
    return None, "not reported"


# ------------------------------------------------------------------------------------------------
# the report as a table


def cell(estimate, unit=1):
    """A value with its interval."""
    if estimate["value"] is None:
        return "-"
    text = f"{unit * estimate['value']:.2f}"
    if estimate["low"] is not None:
        text += f" [{unit * estimate['low']:.2f}, {unit * estimate['high']:.2f}]"
    return text


def print_report(report):
    print(f"{'':28} {'speculative':>26} {'baseline':>26}      [95 % interval over prompts]")
    for name, key, unit in (
            ("ms to the first token", "first_token_s", 1e3),
            ("ms a token after it", "token_s", 1e3),
            ("tokens/s of a request", "tokens_per_s", 1),
            ("tokens/s of all", "tokens_per_s_of_all", 1),
            ("accuracy, %", "accuracy", 100)):
        ours = cell(report["speculative"][key], unit)
        baseline = cell(report["baseline"][key], unit)
        print(f"{name:28} {ours:>26} {baseline:>26}")
    for arm in ARMS:
        figures = report[arm]
        line = f"{figures['answered']} answered, {figures['failed']} failed"
        for reason, count in figures["errors"].items():
            line += f"; {count} x {reason}"
        if figures["need_math_verify"]:
            line += (f"; to compare {figures['need_math_verify']} answers with the known ones as "
                     "mathematics: pip install math-verify")
        print(f"{arm:28} {line}")
    tau = report["speculative"]["tau_source"]
    if report["tau"]:
        tau = f"{report['tau']:.3f}, {tau}"
    print(f"{'tau':28} {tau}")
    if not report["pairs"]:
        print("no prompt was answered by both servers, so there is no speedup")
        return
    print(f"{'speedup':28} {cell(report['speedup'])}x in total time over {report['pairs']} pairs; "
          f"a prompt {report['min']:.2f}x to {report['max']:.2f}x, "
          f"geometric mean {cell(report['geomean'])}x; {report['faster']} faster")
    print(f"{'agreement':28} {cell(report['agreement'], 100)} % of pairs have the same text")


def print_method(config, count):
    """The sentence that a published figure needs beside it."""
    thinking = "on" if config.thinking else "off"
    print(f"\nMethod: {count} prompts of {config.prompts}, temperature {config.temperature}, "
          f"at most {config.max_new_tokens} new tokens, thinking {thinking}; {config.concurrency} "
          "at a time, groups sent to both servers in alternating order after a warm-up; streamed, "
          "timed at the client, prefill and network included; failed requests are in no figure.")
