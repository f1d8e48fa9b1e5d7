"""
Lets the target answer the prompts of any file. data/conversations.py makes training samples of the
answers.

    python data/regenerate.py --prompts=FILE --out=FILE.jsonl \\
        --server=http://localhost:30000/v1 --model=NAME         # asks a server
    python data/regenerate.py --prompts=FILE --out=FILE.jsonl \\
        --target=DIR --drafter=DIR                              # decodes here

A drafter guesses what this target says, right or wrong. Answers of a different model cost it
acceptance. So the target writes every message of the assistant again, in order, each one after the
messages before it. The results of tools stay as they are. A conversation ends before a message that
the target does not finish. "target_turns" of a row are the numbers of the messages that it wrote.

data/rows.py says which prompts can be read. The first form sends many prompts at a time to an
OpenAI-compatible server, for example SGLang or vLLM. The second form decodes as many prompts at
once as it has slots. Above temperature 0 the noise depends on the number of the row, so equal
prompts get different answers.

Each answer goes to OUT.part as soon as it ends. After an interruption the same command resumes
there.
"""
import collections
import functools
import http.client
import json
import os
import queue
import sys
import threading
import time
import urllib.error
import urllib.request
import zlib
from multiprocessing.pool import ThreadPool
from typing import NamedTuple

import torch

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from tokenizer import load_tokenizer, stop_ids
import fast
from checkpoint import load_drafter, load_target
from configurator import configure
from data.rows import (
    Dropped, parse_json, progress, prompt_ids, read_conversations, read_message)
from draft_decode import Request, generate_many
from formats.files import LINE, one_line, where, whole_file
from sampling import Sampling

prompts = ""                    # hub id, file or folder: questions or conversations
out = ""                        # JSON lines of id, messages, target_turns and tools
server = ""                     # address up to /v1 of an OpenAI-compatible server; empty: none
model = ""                      # the target's name on the server
in_flight = 64                  # requests at a time
retries = 6                     # per request that a busy or restarting server did not answer
timeout = 3600.0                # seconds until a whole request counts as not answered
target = "Qwen/Qwen3.5-0.8B"    # without a server: folder or hub id of the target
drafter = ""                    # without a server: folder or hub id of a drafter; empty: none
slots = 32                      # without a server: prompts decoded at once
device = "cuda" if torch.cuda.is_available() else "cpu"  # without a server: cpu or cuda
dtype = "float32" if device == "cpu" else "bfloat16"     # without a server: of weights, activations
temperature = 0.0               # of the target's choice; 0 is greedy
thinking = False                # let a target that can think do so
max_new_tokens = 2048           # per answer; an answer that does not end within them is left out

LONGEST_REPLY = 2 ** 26     # bytes of a server's reply
MAX_REFUSALS = 16           # a run ends if the first 16 prompts are all refused


def main(argv=None):
    config = configure(globals(), argv)
    try:
        counts = regenerate(config)
    except (ValueError, OSError) as error:
        sys.exit(one_line(f"error: {error}", LINE))
    except KeyboardInterrupt:
        sys.exit(f"interrupted: the same command resumes from {config.out}.part")
    listed = ", ".join(f"{count:,} {result}" for result, count in counts.items())
    print(f"{config.out}: {one_line(listed)}")


def regenerate(config):
    """Answer all prompts. Returns {result: number of answers with it}."""
    has_files = config.prompts and config.out
    server_is_complete = bool(config.server) == bool(config.model)
    if not has_files or not server_is_complete or min(config.in_flight, config.slots) < 1:
        raise ValueError("give --prompts and --out, --server with --model or neither, and "
                         "in_flight and slots of at least 1")
    if os.path.lexists(config.out):
        raise ValueError(f"{where(config.out, 100)} is there already: remove it, or give another "
                         "--out")
    prompts = read_prompts(config.prompts)
    os.makedirs(os.path.dirname(os.path.abspath(config.out)), exist_ok=True)
    part_path = config.out + ".part"
    with open(part_path, "a+b", opener=open_no_link) as f:
        part = PartFile(f, prompts)
        if not part.resume(part_header(config)):
            raise ValueError(f"{where(part_path, 80)} was made from other prompts or in another "
                             "way: remove it, or give another --out")
        answer_all(config, part)
        if part.counts["answered"]:
            with whole_file(config.out) as conversations:
                for number in range(len(prompts)):
                    conversations.write(part.conversation(number))
    os.remove(part_path)
    if not part.counts["answered"]:
        listed = ", ".join(f"{count:,} {result}" for result, count in part.counts.items())
        raise ValueError(f"no answer ended, so there is no {where(config.out)}: {listed}; "
                         f"the last: {part.last_result}")
    for reason, count in part.refusals.most_common(5):
        print(one_line(f"{count:,} {reason}"))
    return part.counts


def answer_all(config, part):
    """Add the answers that a PartFile lacks. Each pass answers one message per conversation."""
    answer_some = ask_all if config.server else decode_here
    waiting = part.requests()
    while waiting:
        for number, answer in progress(answer_some(config, waiting), "answer", len(waiting)):
            part.add(number, answer)
            # A refusal can concern one prompt only, for example a prompt longer than the context.
            # If the first prompts are all refused, probably all will be.
            if part.counts["refused"] == part.counts.total() == MAX_REFUSALS:
                return
        waiting = part.requests()


def open_no_link(path, flags):
    """os.open() for a file that may be there. It does not follow a link to a different file."""
    return os.open(path, flags | os.O_NOFOLLOW, 0o666)

# --------------------------------------------------------------------------------------------------
# prompts


class Prompt(NamedTuple):
    id: object          # the row's own, or its number as text
    messages: list
    tools: list | None
    turns: list         # numbers of the messages that the target writes

    def with_answers(self, answers):
        """The messages with the target's answers so far, up to the next one to write."""
        messages = self.messages + [None]
        for turn, answer in zip(self.turns, answers):
            messages[turn] = answer
        ends = [*self.turns, self.turns[-1] + 1]
        return messages[:ends[len(answers)]]


def read_prompts(source):
    """The Prompts of a source. Prints which rows are dropped."""
    prompts = []
    dropped = Dropped(source)
    for place, conversation in dropped.usable(read_conversations(source)):
        messages = conversation.messages
        turns = conversation.answers()
        if messages[-1]["role"] != "assistant":
            turns.append(len(messages))
        name = conversation.id
        if name is None:
            name = str(dropped.read - 1)
        prompts.append(Prompt(name, messages, conversation.tools, turns))
    dropped.finish()
    return prompts


def checksum(prompt):
    """A number that tells whether a prompt is the same as in the run before."""
    return zlib.crc32(json.dumps([prompt.messages, prompt.tools]).encode())

# --------------------------------------------------------------------------------------------------
# OUT.part: a line that says how the answers were made, then a line per answer


def part_header(config):
    """The first line of OUT.part: everything that the answers depend on."""
    return {
        "prompts": config.prompts,
        "model": config.model or config.target,
        "temperature": config.temperature,
        "thinking": config.thinking,
        "max_new_tokens": config.max_new_tokens,
    }


class PartFile:
    """The answers so far. They stay on disk, because there can be hundreds of thousands."""
    def __init__(self, file, prompts):
        self.file = file
        self.prompts = prompts
        self.lines = [[] for _ in prompts]      # where the answers to each prompt are in the file
        self.ended = set()                      # numbers of prompts that get no more answers
        self.counts = collections.Counter(answered=0)
        self.refusals = collections.Counter()   # by reason
        self.last_result = None

    def resume(self, header):
        """Read the file, or begin it. Returns whether it has this header and is for these prompts.
        A torn last line is cut off."""
        self.file.seek(0)
        end = 0
        for line in self.file:
            if not line.endswith(b"\n"):
                break
            try:
                row = parse_json(line)
                if end:
                    number = row["number"]
                    is_same = row["prompt"] == checksum(self.prompts[number])
                    is_same &= number >= 0 and number not in self.ended
                    self.count(row, end)
                else:
                    is_same = row == header
            except (ValueError, LookupError, TypeError, AttributeError):
                is_same = False
            if not is_same:
                return False
            end += len(line)
        self.file.truncate(end)
        if not end:
            self.write(header)
        return True

    def add(self, number, answer):
        """Add the next Answer to a prompt."""
        row = {"number": number, "prompt": checksum(self.prompts[number]),
               "message": answer.message, "why": answer.why_none}
        self.count(row, self.file.seek(0, os.SEEK_END))
        self.write(row)

    def write(self, row):
        self.file.write(json.dumps(row).encode() + b"\n")
        self.file.flush()

    def count(self, row, start):
        """Count a row that begins at this byte of the file."""
        self.last_result = row["why"] or "answered"
        result, _, reason = self.last_result.partition(":")
        self.counts[result] += 1
        if reason:
            self.refusals[self.last_result] += 1
        number = row["number"]
        if row["message"] is None:
            self.ended.add(number)
            return
        self.lines[number].append(start)
        if len(self.lines[number]) == len(self.prompts[number].turns):
            self.ended.add(number)

    def messages(self, number):
        """The messages of a prompt with the answers so far, up to the next one to write."""
        answers = []
        for start in self.lines[number]:
            self.file.seek(start)
            answers.append(json.loads(self.file.readline())["message"])
        return self.prompts[number].with_answers(answers)

    def requests(self):
        """{number: (messages, tools)} for the next message of each conversation."""
        waiting = {}
        for number, prompt in enumerate(self.prompts):
            if number not in self.ended:
                waiting[number] = (self.messages(number), prompt.tools)
        return waiting

    def conversation(self, number):
        """The line of OUT for a prompt. It ends with the last answer. Empty without an answer."""
        prompt = self.prompts[number]
        turns = prompt.turns[:len(self.lines[number])]
        if not turns:
            return b""
        row = {"id": prompt.id, "messages": self.messages(number)[:turns[-1] + 1],
               "target_turns": turns}
        if prompt.tools:
            row["tools"] = prompt.tools
        return json.dumps(row).encode() + b"\n"

# --------------------------------------------------------------------------------------------------
# answers of a server


class Answer(NamedTuple):
    message: dict | None            # None: there is none
    why_none: str | None = None


def ask_all(config, waiting):
    """The server's answers to prompts, {number: (messages, tools)}, in_flight at a time. Yields
    (number, Answer) of each answer as it ends."""
    def ask_one(number):
        return number, ask(config, *waiting[number])

    pool = ThreadPool(config.in_flight)
    try:
        yield from pool.imap_unordered(ask_one, waiting)
    finally:
        pool.terminate()  # does not wait for answers


def ask(config, messages, tools):
    """The server's Answer.

    After a temporary failure (a busy server, a broken connection, half an answer) it waits and
    tries again, each time twice as long. ValueError if the server is still away after the last try.
    """
    request = chat_request(config, messages, tools)
    for attempt in range(config.retries + 1):
        if attempt:
            time.sleep(min(60.0, 0.5 * 2 ** attempt))
        is_away = False
        try:
            status, body = send(request, config.timeout)
            if status == 200:
                return read_answer(body)
            failure = f"{status} {body.decode(errors='replace')}"
            is_away = status in (408, 429, 502, 503, 504)
            if status < 500 and not is_away:
                break
        except (TimeoutError, ValueError, LookupError, TypeError, AttributeError) as error:
            failure = repr(error)  # too slow, or malformed
        except (OSError, http.client.HTTPException) as error:
            failure = repr(error)
            is_away = True
    if is_away:
        raise ValueError(f"{config.server} gave no answer in {config.retries + 1} tries "
                         f"({one_line(failure, 100)}): the same command resumes from here")
    return Answer(None, f"refused: {one_line(failure, 100)}")


def chat_request(config, messages, tools):
    body = {
        "model": config.model,
        "messages": messages,
        "temperature": config.temperature,
        "max_tokens": config.max_new_tokens,
        "chat_template_kwargs": {"enable_thinking": config.thinking},
    }
    if tools:
        body["tools"] = tools
    address = f"{config.server.rstrip('/')}/chat/completions"
    headers = {"Content-Type": "application/json"}
    return urllib.request.Request(address, json.dumps(body).encode(), headers)


def send(request, seconds):
    """(status, body) of a request. TimeoutError if the whole of it takes longer than this. (The
    timeout of urlopen() limits each read, not their total.)"""
    replies = queue.SimpleQueue()

    def fetch():
        try:
            with urllib.request.urlopen(request, timeout=seconds) as response:
                replies.put((200, response.read(LONGEST_REPLY + 1)))
        except urllib.error.HTTPError as error:
            replies.put((error.code, error.read(500)))
        except Exception as error:
            replies.put((None, error))

    threading.Thread(target=fetch, daemon=True).start()
    try:
        status, body = replies.get(timeout=seconds)
    except queue.Empty:
        raise TimeoutError(f"no whole answer in {seconds:g} s") from None
    if status is None:
        raise body
    if len(body) > LONGEST_REPLY:
        raise ValueError(f"an answer of more than {LONGEST_REPLY:,} bytes")
    return status, body


def read_answer(body):
    """The Answer in the body of a reply. An error if it is malformed."""
    choice = parse_json(body)["choices"][0]
    if choice["finish_reason"] not in ("stop", "tool_calls"):
        return Answer(None, "did not end")
    reply = choice["message"]
    if not reply.get("content") and not reply.get("tool_calls"):
        return Answer(None, "empty")
    return Answer(read_message(reply | {"role": "assistant"}))

# --------------------------------------------------------------------------------------------------
# answers decoded here


@functools.cache
def load_models(target_name, drafter_name, device, dtype):
    """(target, drafter or None), prepared for decoding."""
    target = load_target(target_name, device, dtype)
    drafter = None
    if drafter_name:
        drafter = load_drafter(drafter_name, target.config, device, dtype)
    fast.prepare_for_decoding(target, drafter)
    return target, drafter


def decode_here(config, waiting):
    """Decode the answers to prompts, {number: (messages, tools)}. Yields (number, Answer): first
    the refused prompts, then each answer as it ends."""
    target, drafter = load_models(config.target, config.drafter, config.device, config.dtype)
    tokenizer = load_tokenizer(config.target)
    stops = stop_ids(tokenizer)
    tokens_per_forward = 1  # the target's fastest mode without a drafter
    if drafter:
        tokens_per_forward = drafter.block_size
    context = target.config.max_position_embeddings

    prompts = {}  # the token ids of prompts that can be answered, by number
    for number, (messages, tools) in waiting.items():
        try:
            prompt = prompt_ids(tokenizer, messages, tools, config.thinking, context)
            # Check each prompt here, because generate_many refuses all prompts if it refuses one.
            Request(number, prompt, sequence_id=number, stops=stops, config=target.config,
                    max_new_tokens=config.max_new_tokens, tokens_per_forward=tokens_per_forward)
            prompts[number] = prompt
        except ValueError as error:
            yield number, Answer(None, f"refused: {error}")
    if not prompts:
        return

    numbers = list(prompts)
    tokens = [[] for _ in numbers]
    for index, output in generate_many(
            target, drafter, list(prompts.values()), max_new_tokens=config.max_new_tokens,
            slots=min(config.slots, len(prompts)), stop_token_ids=stops,
            tokens_per_forward=tokens_per_forward, sampling=Sampling(config.temperature),
            sequence_ids=numbers):
        if not output.is_finite:
            raise ValueError(f"the logits of {config.target!r} are not finite: its weights are "
                             "broken, or too large for this dtype")
        tokens[index].extend(output.tokens)
        if output.is_last:
            yield numbers[index], text_answer(tokenizer, tokens[index], stops)
            tokens[index] = None  # save memory: there can be hundreds of thousands


def text_answer(tokenizer, tokens, stops):
    """The Answer with these tokens. There is none if they did not end, or if they change when they
    are decoded and encoded again."""
    if tokens[-1] not in stops:
        return Answer(None, "did not end")
    text = tokenizer.decode(tokens[:-1])
    if tokenizer.encode(text) != tokens[:-1]:
        return Answer(None, "does not survive as text")
    return Answer({"role": "assistant", "content": text})


if __name__ == "__main__":
    main()
