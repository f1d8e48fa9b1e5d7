"""
Conversations from files that other people made: the only reader of training rows and of prompts.

    a source    JSON lines, a .json array, parquet, a folder of such files, or a hub data set
    messages    under "conversations" or "messages", as a list or as JSON text, with role and
                content, or from and value (ShareGPT); or a question and its answer under the names
                below. "tools" belong to the row.

Messages and tools go to the chat template unchanged. A row is kept correctly, or it is dropped
under a reason that names the problem; Dropped counts the reasons.
"""
import glob
import json
import os
import socket
import sys
import threading
import time
from typing import NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from huggingface_hub import constants
from tqdm import tqdm

from tokenizer import chat_text, max_characters, special_token_in

MESSAGES = ("conversations", "messages", "conversation")
QUESTIONS = ("question", "problem", "prompt")       # a text, or a list of messages
ANSWERS = ("response", "completion", "answer")      # the same
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "tool": "tool"}
NOT_READ = ("images", "image", "videos", "audios", "functions", "function_call")
DEEPEST = 50            # levels of lists and dicts in tools and tool calls
PROGRESS_SECONDS = 30.0


class UnusableRow(ValueError):
    """Why a row is dropped."""


class UnwantedRow(UnusableRow):
    """Why a good row is dropped: it does not fit the settings. Any number of rows may do so."""


class Conversation(NamedTuple):
    messages: list                      # for the chat template
    tools: list | None = None           # for the chat template
    target_turns: list | None = None    # numbers of the messages that the target wrote, if known
    answer: object = None               # the known answer, to grade an answer with
    id: object = None

    def answers(self):
        """The numbers of the assistant's messages that follow a user's message."""
        roles = [message["role"] for message in self.messages]
        first = roles.index("user")
        return [i for i, role in enumerate(roles) if role == "assistant" and i > first]


class Dropped:
    """Counts the rows of a source, and the reasons for dropping some of them, with their places."""

    def __init__(self, source, unit="line"):
        self.source = source
        self.unit = unit
        self.kept = 0
        self.unusable = 0
        self.places = {}    # by reason: the first three places, and the count

    def add(self, reason, place):
        """Count one row: reason is an UnusableRow, or None for a row that is kept."""
        if reason is None:
            self.kept += 1
            return
        self.unusable += not isinstance(reason, UnwantedRow)
        places, count = self.places.get(str(reason), ([], 0))
        if count < 3:
            places.append(str(place))
        self.places[str(reason)] = (places, count + 1)

    def counts(self):
        return {reason: count for reason, (_, count) in sorted(self.places.items())}

    def print_report(self):
        """Print a line per reason."""
        for reason, (places, count) in sorted(self.places.items()):
            dots = ", .." if count > 3 else ""
            print(f"dropped {count:,}: {reason} ({self.unit} {', '.join(places)}{dots})")

    def check(self):
        """ValueError if no row is kept, or if more than half of the rows are unusable."""
        read = self.kept + sum(self.counts().values())
        if self.kept and self.unusable <= read / 2:
            return
        if not self.places:
            raise ValueError(f"{self.source!r} holds no rows")
        reason, (places, count) = max(self.places.items(), key=by_count)
        raise ValueError(f"{self.source}, {self.unit} {places[0]}: {reason}. {count:,} of {read:,} "
                         f"rows are like this, and {self.kept:,} can be used")


def by_count(item):
    return item[1][1]


# --------------------------------------------------------------------------------------------------
# a row


def read_conversations(source, split="train", part=None):
    """Yield (place, Conversation or UnusableRow) for each row of a source.

    place: the line of a file of JSON lines, elsewhere the number of the row.
    """
    for place, row in read_rows(source, split, part):
        try:
            yield place, conversation_of(row)
        except UnusableRow as reason:
            yield place, reason


def conversation_of(row):
    """The Conversation in a row, or UnusableRow."""
    if isinstance(row, UnusableRow):
        raise row
    messages = listed(first_of(row, MESSAGES), "messages")
    if not messages:
        question = first_of(row, QUESTIONS)
        answer = first_of(row, ANSWERS)
        messages = as_messages(question, "user")
        if messages and answer is not None:
            messages += as_messages(answer, "assistant")
    if not messages:
        raise UnusableRow("no conversation")
    for name in NOT_READ:
        if row.get(name):
            raise UnusableRow(f"{name}, which the target cannot read")
    messages = [read_message(message) for message in messages]
    roles = [message["role"] for message in messages]
    if isinstance(row.get("system"), str) and "system" not in roles:
        messages.insert(0, {"role": "system", "content": row["system"]})
    if "user" not in roles:
        raise UnusableRow("no message of a user")
    tools = listed(row.get("tools"), "tools")
    conversation = Conversation(
        messages, tools or None, row.get("target_turns"), row.get("answer"), row.get("id"))
    check_value(list(conversation))
    check_turns(conversation)
    return conversation


def check_turns(conversation):
    """UnusableRow if target_turns are not numbers of messages that the target can have written."""
    turns = conversation.target_turns
    if turns is None:
        return
    answers = conversation.answers()
    if not isinstance(turns, list) or [turn for turn in turns if turn not in answers]:
        raise UnusableRow("target_turns are not numbers of the assistant's messages")


def first_of(row, names):
    """The value of the first of these keys that a row has; None if it has none of them."""
    values = [row[name] for name in names if row.get(name) not in (None, "", [])]
    return values[0] if values else None


def as_messages(value, role):
    """A list of messages from a text or from a list of messages."""
    if isinstance(value, str):
        return [{"role": role, "content": value}]
    return list(value) if isinstance(value, list) else []


def listed(value, name):
    """A list that may be written as JSON text; an empty list for None."""
    if isinstance(value, str):
        value = parse_json(value) if value.strip() else None
    if not isinstance(value, list | None):
        raise UnusableRow(f"{name} that are not a list")
    return value or []


def parse_json(text):
    """The value of a JSON text, or UnusableRow."""
    try:
        return json.loads(text)
    except RecursionError:
        raise UnusableRow("JSON that is nested too deeply") from None
    except UnicodeDecodeError:
        raise UnusableRow("text that is not utf-8") from None
    except ValueError:
        raise UnusableRow("not JSON") from None


def read_message(message):
    """A message as the chat template takes it, or UnusableRow."""
    if not isinstance(message, dict):
        raise UnusableRow("a message without role and content")
    role = message.get("role") or message.get("from")
    content = message.get("content")
    if content is None:
        content = message.get("value")
    if not isinstance(role, str):
        raise UnusableRow("a message without role and content")
    if role not in ROLES:
        raise UnusableRow(f"an unknown role, {role[:20]!r}")
    if message.get("function_call"):
        raise UnusableRow("function_call, the old form of tool_calls")
    calls = listed(message.get("tool_calls"), "tool_calls")
    if isinstance(content, list):
        content = joined_text(content)
    if content is None and calls:
        content = ""  # as engines do, because some templates would write "None"
    if not isinstance(content, str):
        raise UnusableRow("a message without role and content")
    result = {"role": ROLES[role], "content": content}
    if calls:
        result["tool_calls"] = calls
    thought = first_of(message, THOUGHTS)
    if thought is not None:
        if not isinstance(thought, str):
            raise UnusableRow("a thought that is not text")
        result["reasoning_content"] = thought
    for name in ("name", "tool_call_id"):
        if isinstance(message.get(name), str):
            result[name] = message[name]
    return result


def joined_text(parts):
    """The text of content in parts [{"type": "text", "text": ..}, ..]. Templates join them too."""
    texts = []
    for part in parts:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise UnusableRow("content that is not text")
        texts.append(part["text"])
    return "".join(texts)


def check_value(value, levels=DEEPEST):
    """UnusableRow for a value that a file of JSON cannot hold, or that is nested too deeply for a
    template."""
    if not levels:
        raise UnusableRow("JSON that is nested too deeply")
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError:
            raise UnusableRow("text that is not Unicode: a lone surrogate") from None
    elif isinstance(value, dict):
        check_value(list(value), levels)
        check_value(list(value.values()), levels)
    elif isinstance(value, list):
        for inner in value:
            check_value(inner, levels - 1)
    elif not isinstance(value, int | float | None):  # tables hold dates and bytes
        raise UnusableRow("values that are not JSON")


# --------------------------------------------------------------------------------------------------
# a conversation and the chat template


def render(tokenizer, messages, tools, thinking, opens_answer=True):
    """chat_text() of a conversation. UnusableRow if the template refuses the conversation or leaves
    out a part of it."""
    check_special_tokens(tokenizer, [messages, tools])
    try:
        text = chat_text(tokenizer, messages, thinking, tools, opens_answer)
    except ValueError as error:
        parsed = parse_arguments(messages)
        if parsed != messages:
            return render(tokenizer, parsed, tools, thinking, opens_answer)
        kind = type(error.__cause__).__name__
        raise UnusableRow(f"refused by the chat template ({kind})") from None

    # every tool, tool call and result must make a difference
    def is_the_same(messages, tools):
        try:
            return chat_text(tokenizer, messages, thinking, tools, opens_answer) == text
        except ValueError:
            return False

    if tools and is_the_same(messages, None):
        raise UnusableRow("the chat template ignores tools")
    for i, message in enumerate(messages):
        is_rare = message["role"] in ("developer", "tool")
        if is_rare and is_the_same(messages[:i] + messages[i + 1:], tools):
            raise UnusableRow(f"the chat template ignores the role {message['role']}")
        calls = message.get("tool_calls", [])
        for j in range(len(calls)):
            one_less = message | {"tool_calls": calls[:j] + calls[j + 1:]}
            if is_the_same(messages[:i] + [one_less] + messages[i + 1:], tools):
                raise UnusableRow("the chat template ignores tool_calls")

    # every message must be in the text, in this order
    position = 0
    for message in messages:
        content = message["content"]
        if message["role"] == "assistant":
            content = content.rpartition("</think>")[2]  # templates leave out earlier thoughts
        content = content.strip()
        position = text.find(content, position)
        if position < 0:
            raise UnusableRow(f"the chat template leaves out text of the role {message['role']}")
        position += len(content)
    return text


def check_special_tokens(tokenizer, value):
    """UnusableRow if a text of a JSON value contains a special token. The text of a message must
    never become one."""
    token = special_token_in(tokenizer, value)
    if token:
        raise UnusableRow(f"a special token in the text: {token}")


def prompt_ids(tokenizer, messages, tools, thinking, context):
    """chat_prompt() of a conversation; UnusableRow says why there is none. A text that cannot fit
    into the context is not tokenized, because that can take gigabytes."""
    text = render(tokenizer, messages, tools, thinking)
    if len(text) > max_characters(tokenizer, context):
        raise UnusableRow("longer than the target's context")
    return tokenizer.encode(text, add_special_tokens=False)


def parse_arguments(messages):
    """The messages with dicts for arguments that are JSON text. Engines do this too, because some
    templates take dicts only."""
    parsed = []
    for message in messages:
        if "tool_calls" in message:
            message = message | {"tool_calls": [parse_call(c) for c in message["tool_calls"]]}
        parsed.append(message)
    return parsed


def parse_call(call):
    if not isinstance(call, dict):
        return call
    if isinstance(call.get("function"), dict):
        return call | {"function": parse_call(call["function"])}
    if isinstance(call.get("arguments"), str):
        return call | {"arguments": parse_json(call["arguments"])}
    return call


# --------------------------------------------------------------------------------------------------
# the files


def read_rows(source, split="train", part=None):
    """Yield (place, row) for each row of a source. A row is a dict, or the UnusableRow that says
    why it is not.

    split and part (its configuration, if it has several) are for hub data sets only. ValueError for
    a file that cannot be read at all.
    """
    if not os.path.exists(source):
        yield from enumerate(map(without_nulls, read_hub(source, split, part)), 1)
        return
    files = source_files(source)
    for path in files:
        name = f"{os.path.basename(path)}:" if len(files) > 1 else ""
        for number, row in read_file(path):
            yield f"{name}{number}", row


def source_files(source):
    """The files that a path names: itself, or those in its folder, sorted."""
    if os.path.isfile(source):
        return [source]
    json_lines = glob.glob(os.path.join(glob.escape(source), "*.jsonl"))
    parquet = glob.glob(os.path.join(glob.escape(source), "*.parquet"))
    if not json_lines and not parquet:
        raise ValueError(f"{source!r} holds no .jsonl or .parquet file")
    return sorted(json_lines + parquet)


def read_file(path):
    """(number, row or UnusableRow) of a file's rows."""
    if path.endswith(".parquet"):
        return enumerate(map(without_nulls, read_parquet(path)), 1)
    with open(path, "rb") as f:
        begins_as_array = f.read(100).lstrip().startswith(b"[")
    if path.endswith(".json") and begins_as_array:
        return enumerate(map(as_row, read_json_array(path)), 1)
    return read_json_lines(path)


def read_json_lines(path):
    with open(path, "rb") as f:
        for number, line in enumerate(f, 1):
            if not line.strip():
                continue
            try:
                yield number, as_row(parse_json(line))
            except UnusableRow as reason:
                yield number, reason


def read_json_array(path):
    try:
        with open(path, "rb") as f:
            return parse_json(f.read())
    except UnusableRow as reason:
        raise ValueError(f"cannot read the JSON array {path}: {reason}") from None


def as_row(value):
    return value if isinstance(value, dict) else UnusableRow("not a JSON object")


def read_parquet(path):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(path).iter_batches(1024):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        message = " ".join(str(error).split())
        raise ValueError(f"cannot read {path}: {message}") from None


def without_nulls(value):
    """A value of a table without the keys that are null: a table gives every row the keys of all
    rows."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def read_hub(name, split, part):
    refused = (f"no file {name!r}, and the hub does not give such a data set (%s): copy its files "
               "here and give the path of their folder instead")
    is_offline = not hub_answers()
    if is_offline and not has_copy(name):
        raise ValueError(refused % "offline")
    import datasets  # here, because it takes a second, and local files do not need it

    if is_offline:
        datasets.config.HF_HUB_OFFLINE = True  # or it asks the hub again for half a minute
    try:
        yield from datasets.load_dataset(name, part, split=split)
    # Offline, unknown, gated, a broken copy: four libraries raise a dozen types of exceptions.
    except Exception as error:
        raise ValueError(refused % type(error).__name__) from None


def hub_answers(seconds=1.0):
    """Whether the hub, or the proxy in front of it, takes a connection."""
    if constants.HF_HUB_OFFLINE:
        return False
    address = urlsplit(getproxies().get("https") or constants.ENDPOINT)
    port = address.port or (80 if address.scheme == "http" else 443)
    connected = threading.Event()

    def connect():
        try:
            socket.create_connection((address.hostname, port), seconds).close()
            connected.set()
        except OSError:
            pass

    thread = threading.Thread(target=connect, daemon=True)  # looking up a name has no time limit
    thread.start()
    thread.join(1.5 * seconds)
    return connected.is_set()


def has_copy(name):
    """Whether a cache of this machine may hold a hub data set."""
    home = os.environ.get("HF_DATASETS_CACHE", os.path.join(constants.HF_HOME, "datasets"))
    owner = name.partition("/")[0]
    in_hub_cache = os.path.join(constants.HF_HUB_CACHE, f"datasets--{name.replace('/', '--')}")
    return os.path.exists(in_hub_cache) or bool(glob.glob(os.path.join(home, f"{owner}___*")))


# --------------------------------------------------------------------------------------------------
# progress


def progress(items, unit, total=None):
    """Yield the items. A terminal shows a bar; a log gets a line about every 30 seconds."""
    if sys.stderr.isatty():
        yield from tqdm(items, total=total, unit=unit)
        return
    start = time.monotonic()
    last = start
    for count, item in enumerate(items, 1):
        yield item
        now = time.monotonic()
        if now - last < PROGRESS_SECONDS:
            continue
        last = now
        line = f"{count:,} {unit}s"
        if total:
            minutes = (now - start) / 60 / count * max(0, total - count)
            line += f" of {total:,}, about {minutes:.1f} minutes left"
        print(line, file=sys.stderr, flush=True)
