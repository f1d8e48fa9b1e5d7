"""
What `python bench.py serve` measures: two OpenAI-compatible servers, one with a drafter and one without, on the same
prompts. Each group of `concurrency` prompts goes to one server, then to the other, in alternating order; requests
stream, and their clocks start when they are sent. A request that fails in any way is counted with its reason and is in
no figure of speed, accuracy or agreement; a pair counts where both servers answered.

Acceptance is the server's own word: vLLM counts drafts and accepted tokens on /metrics; SGLang has the mean length of
all rounds since it started, avg_spec_accept_length, on /server_info (before: /get_server_info). Both count the target's
own token in. Others report none.
"""
import collections
import http.client
import json
import re
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from statistics import median

import numpy as np

FAILURES = (OSError, http.client.HTTPException, ValueError, LookupError, TypeError, AttributeError)

# ----------------------------------------------------------------------------------------------------------------------
# the client


def ask(url, body, timeout):
    """One streamed answer: {"text", "tokens", "first", "seconds"}, both times from the sending of the request, or
    {"error": why}. timeout: seconds until it must have ended, however lively the stream is."""
    request = urllib.request.Request(f"{url}/chat/completions", json.dumps(body).encode(),
                                     {"Content-Type": "application/json"})
    began, first, text, usage, ended = time.perf_counter(), None, "", {}, None
    try:
        with urllib.request.urlopen(request, timeout=timeout) as response:
            for line in response:
                if time.perf_counter() - began > timeout:
                    raise TimeoutError
                if not line.startswith(b"data:") or line[5:].strip() == b"[DONE]":
                    continue
                chunk = json.loads(line[5:])
                if "error" in chunk:
                    raise ValueError(f"error in the stream: {chunk['error']}")
                usage = chunk.get("usage") or usage
                for choice in chunk["choices"]:
                    new, ended = choice["delta"].get("content") or "", choice.get("finish_reason") or ended
                    if first is None and (new or choice["delta"].get("reasoning_content")):
                        first = time.perf_counter() - began
                    text += new
        seconds, tokens = time.perf_counter() - began, usage.get("completion_tokens")
        if not text or ended not in ("stop", "length"):
            raise ValueError("no text" if not text else f"ended with finish_reason {ended!r}")
        if not isinstance(tokens, int) or not 1 <= tokens <= body["max_tokens"]:
            raise ValueError(f"{tokens!r} tokens in its usage, asked for {body['max_tokens']} at most")
    except urllib.error.HTTPError as error:
        return {"error": f"status {error.code}"}
    except TimeoutError:
        return {"error": f"no end within {timeout:g} s"}
    except FAILURES as error:
        return {"error": " ".join(f"{type(error).__name__}: {error}".split())[:200]}
    return {"text": text, "tokens": tokens, "first": first, "seconds": seconds}


def get(url, timeout):
    """The text at an address; "" where there is none."""
    try:
        with urllib.request.urlopen(url, timeout=min(timeout, 10)) as response:
            return response.read().decode()
    except FAILURES:
        return ""


def model_name(url, timeout):
    """The first model that a server lists. ValueError when it does not."""
    try:
        return json.loads(get(f"{url}/models", timeout))["data"][0]["id"]
    except FAILURES:
        raise ValueError(f"{url} lists no model: is it up, and does the address end in /v1? else give --served_model "
                         "and see") from None


def acceptance(url, timeout):
    """What a server says of its acceptance so far: {"drafts", "accepted"} or {"mean"} or nothing."""
    root, totals = url.removesuffix("/v1"), collections.Counter()
    for name, count in re.findall(r"^vllm:spec_decode_num_(drafts|accepted_tokens)_total(?:\{.*\})? ([\d.e+]+)$",
                                  get(f"{root}/metrics", timeout), re.MULTILINE):
        totals[name] += float(count)
    if totals:
        return {"drafts": totals["drafts"], "accepted": totals["accepted_tokens"]}
    try:
        states = json.loads(get(f"{root}/server_info", timeout) or get(f"{root}/get_server_info", timeout))
        means = [state["avg_spec_accept_length"] for state in states["internal_states"]]
        return {"mean": sum(means) / len(means)}
    except (*FAILURES, ZeroDivisionError):
        return {}


def measure(servers, body, questions, concurrency, timeout, journal, progress):
    """One row a group of prompts: {arm: {"answers": [ask()'s], "wall": seconds, "before", "after": acceptance()'s}}.

    servers: {arm: (address up to /v1, model)}. ValueError when one does not answer the first prompt."""
    def send(arm, question):
        url, model = servers[arm]
        return ask(url, body | {"model": model, "messages": [{"role": "user", "content": question}]}, timeout)

    for arm, (url, _) in servers.items():  # the warm-up
        if why := send(arm, questions[0]).get("error"):
            raise ValueError(f"the {arm} server {url} does not answer the first prompt ({why}): is it up, and does "
                             "the address end in /v1?")
    groups = [questions[i:i + concurrency] for i in range(0, len(questions), concurrency)]
    with ThreadPoolExecutor(concurrency) as pool:
        def make(i):
            row = {}
            for arm in list(servers)[::1 if i % 2 else -1]:
                before, began = acceptance(servers[arm][0], timeout), time.perf_counter()
                answers = list(pool.map(lambda question: send(arm, question), groups[i]))
                row[arm] = {"answers": answers, "wall": time.perf_counter() - began, "before": before,
                            "after": acceptance(servers[arm][0], timeout)}
            return row
        return [journal.row(i, make) for i in progress(range(len(groups)))]

# ----------------------------------------------------------------------------------------------------------------------
# figures


def estimate(f, *columns):
    """{"value", "low", "high"}: f of columns (n,) and its 95 % interval over 1,000 samples of prompts with replacement
    (percentile bootstrap: Efron, Annals of Statistics 7, 1979). f works along the last axis. None where unknown."""
    columns = [np.asarray(column, float) for column in columns]
    n = len(columns[0])
    low = high = None
    if n > 1:
        at = np.random.default_rng(0).integers(n, size=(1000, n))
        with np.errstate(divide="ignore", invalid="ignore"):
            low, high = np.nanpercentile(f(*(column[at] for column in columns)), (2.5, 97.5)).tolist()
    return {"value": float(f(*columns)) if n else None, "low": low, "high": high}


def mean(x):
    return x.mean(-1)


def ratio(a, b):
    return a.sum(-1) / b.sum(-1)


def tau(rows):
    """(tokens a round, how it is known) by the server's word before and after each row; (None, ..) without one."""
    drafts, accepted = (sum(row["after"].get(key, 0) - row["before"].get(key, 0) for row in rows)
                        for key in ("drafts", "accepted"))
    if drafts > 0:
        return 1 + accepted / drafts, "the server's counters over these requests"
    return (rows[-1]["after"].get("mean"), "the server's mean since its start") if rows[-1]["after"].get("mean") else (
        None, "not reported")


def arm_figures(rows, known, is_correct):
    """Figures of one server, from its parts of measure()'s rows and the known answers."""
    answers = [answer for row in rows for answer in row["answers"]]
    good = [(a, answer) for a, answer in zip(answers, known) if "error" not in a]
    checked = [(a["text"], answer) for a, answer in good if answer is not None]
    late = [(a["seconds"] - a["first"], a["tokens"] - 1) for a, _ in good if a["tokens"] > 1 and a["first"]]
    whole = [row for row in rows if all("error" not in a for a in row["answers"])]
    length, source = tau(rows)
    return {
        "answered": len(good), "failed": len(answers) - len(good),
        "errors": collections.Counter(a["error"] for a in answers if "error" in a),
        "first_token_s": estimate(mean, [a["first"] for a, _ in good if a["first"]]),
        "token_s": estimate(ratio, *zip(*late)) if late else estimate(ratio, [], []),
        "tokens_per_s": estimate(ratio, [a["tokens"] for a, _ in good], [a["seconds"] for a, _ in good]),
        "tokens_per_s_of_all": estimate(ratio, [sum(a["tokens"] for a in row["answers"]) for row in whole],
                                        [row["wall"] for row in whole]),
        "accuracy": estimate(mean, [is_correct(*pair) for pair in checked]), "tau": length, "tau_source": source}


def statistics(rows, known, is_correct):
    """The report's figures from measure()'s rows and the known answers (None: unknown)."""
    arms = {arm: [row[arm] for row in rows] for arm in ("speculative", "baseline")}
    figures = {arm: arm_figures(made, known, is_correct) for arm, made in arms.items()}
    pairs = [(a, b) for row in rows for a, b in zip(row["speculative"]["answers"], row["baseline"]["answers"])
             if "error" not in a and "error" not in b]
    gains = [a["tokens"] / a["seconds"] / (b["tokens"] / b["seconds"]) for a, b in pairs]
    columns = [[answer[key] for answer in made] for made in (zip(*pairs) if pairs else ((), ()))
               for key in ("tokens", "seconds")]
    return {
        "command": "serve", "prompts": len(known), "pairs": len(pairs), **figures, "tau": figures["speculative"]["tau"],
        "speedup": estimate(lambda n, s, m, t: ratio(n, s) / ratio(m, t), *columns),
        "geomean": estimate(lambda x: np.exp(np.log(x).mean(-1)), gains), "faster": sum(g > 1 for g in gains),
        "min": min(gains, default=None), "median": median(gains) if gains else None, "max": max(gains, default=None),
        "agreement": estimate(mean, [a["text"] == b["text"] for a, b in pairs])}


def show(r):
    """The report as a table."""
    def cell(x, unit=1, form=".2f"):
        parts = [f"{unit * v:{form}}" for v in x.values() if v is not None]
        return parts[0] + (f" [{parts[1]}, {parts[2]}]" if parts[1:] else "") if parts else "-"

    print(f"{'':28} {'speculative':>26} {'baseline':>26}      [95 % interval over prompts]")
    for name, key, unit in (("ms to the first token", "first_token_s", 1e3), ("ms a token after it", "token_s", 1e3),
                            ("tokens/s of a request", "tokens_per_s", 1), ("tokens/s of all", "tokens_per_s_of_all", 1),
                            ("accuracy, %", "accuracy", 100)):
        print(f"{name:28} " + " ".join(f"{cell(r[arm][key], unit):>26}" for arm in ("speculative", "baseline")))
    for arm in ("speculative", "baseline"):
        a = r[arm]
        print(f"{arm:28} {a['answered']} answered, {a['failed']} failed"
              + "".join(f"; {count} x {why}" for why, count in a["errors"].items()))
    print(f"{'tau':28} " + (f"{r['tau']:.3f}, " if r["tau"] else "") + r["speculative"]["tau_source"])
    if r["pairs"]:
        print(f"{'speedup':28} {cell(r['speedup'])}x in total time over {r['pairs']} pairs; a prompt "
              f"{r['min']:.2f}x to {r['max']:.2f}x, geometric mean {cell(r['geomean'])}x; {r['faster']} faster")
        print(f"{'agreement':28} {cell(r['agreement'], 100)} % of pairs have the same text")
    else:
        print("no prompt was answered by both servers, so there is no speedup")
