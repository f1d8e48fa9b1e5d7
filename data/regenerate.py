"""
Lets the target answer the prompts of any file. data/conversations.py makes training samples of the
answers.

    python data/regenerate.py --prompts=FILE --out=FILE.jsonl \\
        --server=http://localhost:30000/v1 --model=NAME         # asks a server
    python data/regenerate.py --prompts=FILE --out=FILE.jsonl \\
        --target=DIR --drafter=DIR                              # decodes here

A drafter guesses what this target says, right or wrong. Answers of a different model cost it
acceptance. The first form sends many prompts at a time to an OpenAI-compatible server, for example
SGLang or vLLM. The second form decodes as many prompts at once as it has slots. Above temperature 0
it decodes one after another, because then each prompt has its own noise.

Each answer goes to OUT.part as soon as it ends. After an interruption the same command resumes
there.
"""
import collections
import functools
import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request
import zlib
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import torch
from tqdm import tqdm

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import chat_prompt, load_tokenizer, stop_ids
import fast
from checkpoint import load_drafter, load_target
from configurator import configure
from data.conversations import UnusableRow, read_conversation
from data.samples import read_source
from draft_decode import Request, generate_many
from sampling import Sampling

prompts = ""                    # hub id, file or folder: question, problem, prompt or messages
out = ""                        # JSON lines of id and messages
server = ""                     # address up to /v1 of an OpenAI-compatible server; empty: none
model = ""                      # the target's name on the server
in_flight = 64                  # requests at a time
retries = 6                     # per request that a busy or restarting server did not answer
timeout = 3600.0                # seconds until a request counts as not answered
target = "Qwen/Qwen3.5-0.8B"    # without a server: folder or hub id of the target
drafter = ""                    # without a server: folder or hub id of a drafter; empty: none
slots = 32                      # without a server: prompts decoded at once at temperature 0
device = "cuda" if torch.cuda.is_available() else "cpu"  # without a server: cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # without a server: of weights, activations
temperature = 0.0               # of the target's choice; 0 is greedy
thinking = False                # let a target that can think do so
max_new_tokens = 2048           # per answer; an answer that does not end within them is left out


def main(argv=None):
    config = configure(globals(), argv)
    try:
        counts = regenerate(config)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    except KeyboardInterrupt:
        sys.exit(f"interrupted: the same command resumes from {config.out}.part")
    listed = ", ".join(f"{count:,} {outcome}" for outcome, count in counts.items())
    print(f"{config.out}: {listed}")


def regenerate(config):
    """Answer all prompts. Returns {result: number of prompts with it}."""
    has_files = config.prompts and config.out
    server_is_complete = bool(config.server) == bool(config.model)
    if not has_files or not server_is_complete or min(config.in_flight, config.slots) < 1:
        raise ValueError("give --prompts and --out, --server with --model or neither, and "
                         "in_flight and slots of at least 1")
    if os.path.exists(config.out):
        raise ValueError(f"{config.out} is there already: remove it, or give another --out")
    prompts = read_prompts(config.prompts)
    os.makedirs(os.path.dirname(os.path.abspath(config.out)), exist_ok=True)
    part = config.out + ".part"
    answered = resume(part, part_header(config), prompts)

    waiting = {}  # messages by the number of their prompt
    for number, prompt in enumerate(prompts):
        if number not in answered:
            waiting[number] = prompt.messages
    if config.server:
        ask_one = functools.partial(ask, config)
        answers = zip(waiting, map_in_order(ask_one, waiting.values(), config.in_flight))
    else:
        answers = decode_here(config, waiting)
    bar = tqdm(answers, initial=len(answered), total=len(prompts), unit="prompt",
               disable=not sys.stderr.isatty())
    with open(part, "a") as f:
        for number, answer in bar:
            # A refusal can concern one prompt only, for example a prompt longer than the context.
            # If the first prompt is refused, probably all will be, so stop there.
            if number == 0 and answer.is_refused():
                raise ValueError(f"the first prompt is {answer.why_none}")
            row = {"number": number, "prompt": prompts[number].messages, "answer": answer.text,
                   "why": answer.why_none}
            f.write(json.dumps(row) + "\n")
            f.flush()
    return finish(part, config.out, prompts)

# --------------------------------------------------------------------------------------------------
# prompts


class Prompt(NamedTuple):
    id: object          # the row's own, or its number as text
    messages: list      # [{"role", "content"}, ..] that ends with a user's turn


def read_prompts(source):
    """The Prompts of a file, a folder or a hub data set. ValueError names a row without one."""
    prompts = []
    for number, row in enumerate(read_source(source), 1):
        try:
            messages = question_of(row) or read_conversation(row)
        except UnusableRow as reason:
            raise ValueError(f"{source}, row {number}: no question, problem or prompt, "
                             f"and {reason}") from None
        # the target answers the last user's turn of a conversation again
        while messages and messages[-1]["role"] != "user":
            messages = messages[:-1]
        if not messages:
            raise ValueError(f"{source}, row {number}: no message of a user")
        prompts.append(Prompt(row.get("id", str(number - 1)), messages))
    if not prompts:
        raise ValueError(f"{source!r} holds no prompts")
    return prompts


def question_of(row):
    """The messages of a row whose prompt is a plain text; None if it has none."""
    for key in ("question", "problem", "prompt"):
        if isinstance(row.get(key), str):
            return [{"role": "user", "content": row[key]}]
    return None

# --------------------------------------------------------------------------------------------------
# answers, of a server or decoded here


class Answer(NamedTuple):
    text: str | None            # None: there is none
    why_none: str | None = None

    def is_refused(self):
        return self.text is None and self.why_none.startswith("refused")


def ask(config, messages):
    """The server's Answer.

    After a temporary failure (a busy server, a broken connection) it waits and tries again, each
    time twice as long. ValueError after the last try.
    """
    request = chat_request(config, messages)
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(min(60.0, 0.5 * 2 ** attempt))
        try:
            with urllib.request.urlopen(request, timeout=config.timeout) as response:
                choice = json.load(response)["choices"][0]
            text = choice["message"]["content"]
            ended = choice["finish_reason"] == "stop"
        except urllib.error.HTTPError as error:
            body = error.read(500).decode(errors="replace")
            failure = f"{error.code} {' '.join(body.split())}"
            may_pass = error.code in (408, 429) or error.code >= 500
            if not may_pass:
                return Answer(None, f"refused: {failure}")
        # no connection, or an answer that is cut off or malformed
        except (OSError, http.client.HTTPException, ValueError, LookupError, TypeError) as error:
            failure = repr(error)
        else:
            if choice["message"].get("reasoning_content"):
                raise ValueError(f"{config.server} takes thoughts out of its answers: start it "
                                 "without a reasoning parser")
            if not ended:
                return Answer(None, "did not end")
            if not text:
                return Answer(None, "empty")
            return Answer(text)
    raise ValueError(f"{config.server} gave no answer in {config.retries + 1} tries ({failure}): "
                     "the same command resumes from here")


def chat_request(config, messages):
    body = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_new_tokens,
        "chat_template_kwargs": {"enable_thinking": config.thinking},
    }
    address = f"{config.server.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(address, json.dumps(body).encode(), headers)


def map_in_order(function, items, width):
    """function(item) of each item, in order. It runs `width` calls at a time, at most 4 * width
    ahead of the caller."""
    ahead = collections.deque()
    with ThreadPoolExecutor(width) as pool:
        try:
            for item in items:
                ahead.append(pool.submit(function, item))
                if len(ahead) == 4 * width:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:  # after an error: cancel the calls that have not begun
            for future in ahead:
                future.cancel()


def decode_here(config, waiting):
    """Decode the answers to prompts, {number: messages}. Yields (number, Answer): first the refused
    prompts, then each answer as it ends."""
    target = load_target(config.target, config.device, config.dtype)
    tokenizer = load_tokenizer(config.target)
    stops = stop_ids(tokenizer)
    drafter = None
    tokens_per_forward = 1  # the target's fastest mode without a drafter
    if config.drafter:
        drafter = load_drafter(config.drafter, target.config, config.device, config.dtype)
        tokens_per_forward = drafter.block_size
    fast.prepare_for_decoding(target, drafter)
    sizes = (target.config, tokens_per_forward)

    token_ids = {}  # of prompts that can be answered, by number
    for number, messages in waiting.items():
        try:
            prompt = chat_prompt(tokenizer, messages, config.thinking)
            # Check each prompt here, because generate_many refuses all prompts if it refuses one.
            Request(number, prompt, config.max_new_tokens, stops, sizes)
        except ValueError as error:
            yield number, Answer(None, f"refused: {error}")
        else:
            token_ids[number] = prompt

    # Greedy answers share a batch. Sampled ones do not: each prompt has its own seed, because in
    # one batch all prompts would share their noise.
    if config.temperature == 0:
        batches = [(list(token_ids), Sampling())]
    else:
        batches = []
        for number, prompt in token_ids.items():
            seed = zlib.crc32(str(prompt).encode())
            batches.append(([number], Sampling(config.temperature, seed=seed)))
    for numbers, sampling in batches:
        prompts = [token_ids[number] for number in numbers]
        slots = min(config.slots, len(prompts))
        tokens = [[] for _ in prompts]
        for index, output in generate_many(
                target, drafter, prompts, max_new_tokens=config.max_new_tokens, slots=slots,
                stop_token_ids=stops, tokens_per_forward=tokens_per_forward, sampling=sampling):
            tokens[index].extend(output.tokens)
            if output.is_last:
                yield numbers[index], text_answer(tokenizer, tokens[index], stops)
                tokens[index] = None  # save memory: there can be hundreds of thousands


def text_answer(tokenizer, tokens, stops):
    """The Answer with these tokens. Its text is None if they did not end, or if they change when
    they are decoded and encoded again."""
    if tokens[-1] not in stops:
        return Answer(None, "did not end")
    text = tokenizer.decode(tokens[:-1])
    if tokenizer.encode(text) != tokens[:-1]:
        return Answer(None, "does not survive as text")
    return Answer(text)

# --------------------------------------------------------------------------------------------------
# files: OUT.part has a header line that says how it was made, then a line per answer


def part_header(config):
    """The first line of OUT.part: everything that the answers depend on."""
    return {
        "prompts": config.prompts,
        "model": config.model or config.target,
        "temperature": config.temperature,
        "thinking": config.thinking,
        "max_new_tokens": config.max_new_tokens,
    }


def resume(part, header, prompts):
    """The numbers of the prompts that OUT.part already answers. A torn last line is cut off.

    ValueError if it was made with different settings or from different prompts.
    """
    if not os.path.exists(part) or not os.path.getsize(part):
        with open(part, "w") as f:
            f.write(json.dumps(header) + "\n")
        return set()
    with open(part, "rb+") as f:
        lines = [line for line in f if line.endswith(b"\n")]
        f.truncate(sum(map(len, lines)))
    rows = [json.loads(line) for line in lines]
    is_same = rows[:1] == [header]
    answered = set()
    for row in rows[1:]:
        number = row.get("number", len(prompts))
        is_same = is_same and number < len(prompts) and row["prompt"] == prompts[number].messages
        answered.add(number)
    if not is_same:
        raise ValueError(f"{part} was made from other prompts or in another way ({rows[:1]}): "
                         "remove it, or give another --out")
    return answered


def finish(part, out, prompts):
    """Write the conversations that have an answer from OUT.part to OUT, in the prompts' order, and
    remove OUT.part. Returns {result: number of prompts with it}."""
    counts = collections.Counter()
    with open(part, "rb") as answered, open(out + ".tmp", "w") as f:
        line_starts = {}  # by the number of the prompt
        line = answered.readline()  # the header
        while line:
            start = answered.tell()
            line = answered.readline()
            if line:
                line_starts[json.loads(line)["number"]] = start
        for number, prompt in enumerate(prompts):
            answered.seek(line_starts[number])
            row = json.loads(answered.readline())
            outcome = row["why"] or "answered"
            counts[outcome.partition(":")[0]] += 1
            if row["why"] is None:
                answer = {"role": "assistant", "content": row["answer"]}
                conversation = {"id": prompt.id, "messages": prompt.messages + [answer]}
                f.write(json.dumps(conversation) + "\n")
    os.replace(out + ".tmp", out)
    os.remove(part)
    return counts


if __name__ == "__main__":
    main()
