"""
Target-matched answers: what the target itself says to the prompts of any file, as rows for data/math240k/prepare.py.

    python data/regenerate.py --prompts=FILE --out=FILE.jsonl --server=http://localhost:30000/v1 --model=NAME
    python data/regenerate.py --prompts=FILE --out=FILE.jsonl --target=DIR --drafter=DIR       # without a server

A drafter guesses what this target says, right or wrong; answers of another model cost it acceptance. The first form
asks an OpenAI-compatible server, SGLang's or vLLM's, many prompts at a time; the second decodes here, one by one.
Answers stand in the prompts' order in OUT.part; after an interruption the same command goes on from there.
"""
import collections
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor

import torch
from tqdm import tqdm

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path[:0] = [ROOT]  # the project's modules, from whatever folder this is run
from configurator import configure
from data.rows import conversation, read_source
from draft_decode import Sampling, run
from model import load_drafter
from target import chat_prompt, load_target, load_tokenizer, stop_ids

prompts = ""                    # hub id, file or folder of JSON lines or parquet: question, problem, prompt or messages
out = ""                        # JSON lines of id and messages
server = ""                     # address up to /v1 of an OpenAI-compatible server; empty: decode here
model = ""                      # the target's name on the server
in_flight = 64                  # requests at a time
retries = 6                     # of a request that a busy or restarting server did not answer
timeout = 3600.0                # seconds until a request counts as not answered
target = "Qwen/Qwen3.5-0.8B"    # without a server: folder or hub id of the target
drafter = ""                    # without a server: folder or hub id of a drafter, for speed; empty: none
device = "cuda" if torch.cuda.is_available() else "cpu"  # without a server: cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # without a server: of weights and activations
temperature = 0.0               # of the target's choice; 0 is greedy
thinking = False                # let a target that can think do so
max_new_tokens = 2048           # tokens of an answer; one that does not end within them is left out

# ----------------------------------------------------------------------------------------------------------------------
# prompts


def read_prompts():
    """[(id, messages that end with a user's turn)] of the file. ValueError names a row without a question."""
    found = []
    for number, row in enumerate(read_source(prompts), 1):
        text = next((row[k] for k in ("question", "problem", "prompt") if isinstance(row.get(k), str)), None)
        messages = [{"role": "user", "content": text}] if text is not None else conversation(row)
        if isinstance(messages, str):
            raise ValueError(f"{prompts}, row {number}: no question, problem or prompt, and {messages}")
        last = max((i for i, m in enumerate(messages) if m["role"] == "user"), default=-1)
        if last < 0:
            raise ValueError(f"{prompts}, row {number}: no message of a user")
        found.append((row.get("id", str(number - 1)), messages[:last + 1]))
    if not found:
        raise ValueError(f"{prompts!r} holds no prompts")
    return found

# ----------------------------------------------------------------------------------------------------------------------
# answers: functions of the messages that return (text, None), or (None, why there is none). A refusal may concern this
# prompt alone, as one longer than the context; when the first is refused, it is taken to concern all.


def ask(messages):
    """The server's answer. What may pass, a busy server or a broken connection, is tried again after a pause that
    doubles; ValueError after the last try."""
    body = json.dumps({"model": model, "messages": messages, "temperature": temperature, "max_tokens": max_new_tokens,
                       "chat_template_kwargs": {"enable_thinking": thinking}}).encode()
    request = urllib.request.Request(f"{server.rstrip('/')}/chat/completions", body,
                                     {"Content-Type": "application/json"})
    for attempt in range(retries + 1):
        if attempt:
            time.sleep(min(60.0, 0.5 * 2 ** attempt))
        try:
            with urllib.request.urlopen(request, timeout=timeout) as response:
                choice = json.load(response)["choices"][0]
                text, ended = choice["message"]["content"], choice["finish_reason"] == "stop"
            break
        except urllib.error.HTTPError as error:
            why = f"{error.code} {' '.join(error.read(500).decode(errors='replace').split())}"
            if error.code not in (408, 429) and error.code < 500:
                return None, f"refused: {why}"
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            why = repr(error)
    else:
        raise ValueError(f"{server} gave no answer in {retries + 1} tries ({why}): the same command goes on from here")
    if choice["message"].get("reasoning_content"):
        raise ValueError(f"{server} takes thoughts out of its answers: start it without a reasoning parser")
    return (text, None) if ended and text else (None, "did not end" if not ended else "empty")


def decoder():
    """A function like ask that decodes here."""
    where, tokenizer = load_target(target, device, dtype), load_tokenizer(target)
    draft = load_drafter(drafter, where.config, device, dtype) if drafter else None
    stops, decoders = stop_ids(tokenizer), {}

    def answer(messages):
        try:
            prompt = chat_prompt(tokenizer, messages, thinking)
            s = Sampling(temperature, seed=zlib.crc32(str(prompt).encode()))  # else prompts would share their noise
            tokens, _, _ = run(where, draft, prompt, max_new_tokens, stops, None if draft else 1, s,
                               decoders=None if temperature else decoders)
        except ValueError as error:
            return None, f"refused: {error}"
        if tokens[-1] not in stops:
            return None, "did not end"
        text = tokenizer.decode(tokens[:-1])
        return (text, None) if tokenizer.encode(text) == tokens[:-1] else (None, "does not survive as text")
    return answer


def in_order(work, items, width):
    """work(item) of each item, in order; `width` at a time, and no further ahead than four times that."""
    ahead = collections.deque()
    with ThreadPoolExecutor(width) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(work, item))
                if len(ahead) == 4 * width:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            for future in ahead:
                future.cancel()

# ----------------------------------------------------------------------------------------------------------------------
# the file: OUT.part, whose first line says how it was made, then a line for each prompt; OUT when all are there


def resume(part, header, questions):
    """The number of prompts that OUT.part answers already; a torn last line is cut off. ValueError when it was made in
    another way or from other prompts."""
    if not os.path.exists(part) or not os.path.getsize(part):
        with open(part, "w") as f:
            f.write(json.dumps(header) + "\n")
        return 0
    with open(part, "rb+") as f:
        lines = [line for line in f if line.endswith(b"\n")]
        f.truncate(sum(map(len, lines)))
    rows = [json.loads(line) for line in lines]
    same = rows[:1] == [header] and len(rows) <= len(questions) + 1
    if not same or any(row["prompt"] != messages for row, (_, messages) in zip(rows[1:], questions)):
        raise ValueError(f"{part} was made from other prompts or in another way ({rows[:1]}): remove it, or give "
                         "another --out")
    return len(rows) - 1


def regenerate():
    """Answer all prompts; returns {what became of a prompt: how many}."""
    if not prompts or not out or in_flight < 1 or bool(server) != bool(model):
        raise ValueError("give --prompts and --out, --server with --model or neither, and in_flight of at least 1")
    if os.path.exists(out):
        raise ValueError(f"{out} is there already: remove it, or give another --out")
    questions, part = read_prompts(), out + ".part"
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    header = {"prompts": prompts, "model": model if server else target, "temperature": temperature,
              "thinking": thinking, "max_new_tokens": max_new_tokens}
    done = resume(part, header, questions)
    todo = [messages for _, messages in questions[done:]]
    answers = in_order(ask, todo, in_flight) if server else map(decoder(), todo)
    bar = tqdm(answers, initial=done, total=len(questions), unit="prompt", disable=not sys.stderr.isatty())
    with open(part, "a") as f:
        for messages, (text, why) in zip(todo, bar):
            if why and why.startswith("refused") and not done:
                raise ValueError(f"the first prompt is {why}")
            done += 1
            f.write(json.dumps({"prompt": messages, "answer": text, "why": why}) + "\n")
            f.flush()
    counts = collections.Counter()
    with open(part) as f, open(out + ".tmp", "w") as kept:
        next(f)
        for (name, messages), row in zip(questions, map(json.loads, f)):
            counts[(row["why"] or "answered").partition(":")[0]] += 1
            if row["why"] is None:
                messages = [*messages, {"role": "assistant", "content": row["answer"]}]
                kept.write(json.dumps({"id": name, "messages": messages}) + "\n")
    os.replace(out + ".tmp", out)
    os.remove(part)
    return counts


def main():
    configure(globals())
    try:
        counts = regenerate()
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: the same command goes on from {out}.part")
    print(f"{out}: " + ", ".join(f"{count:,} {what}" for what, count in counts.items()))


if __name__ == "__main__":
    main()
