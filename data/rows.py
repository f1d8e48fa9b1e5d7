"""
Conversations from files that other people made: the only reader of training rows and of prompts.

    a source    JSON lines, parquet, a folder of these, a .json array, or a hub data set
    messages    a list, or its JSON text, under "conversations" or "messages". A message has role
                and content, or from and value (ShareGPT). Or the row has a question and its answer
                under the names below. "tools" belong to the row.

Messages and tools go to the chat template unchanged. A row is kept correctly, or it is dropped
under a reason that names the problem; Dropped counts the reasons.
"""
import glob
import json
import os
import sys
from typing import NamedTuple

from huggingface_hub import constants
from tqdm import tqdm

from checkpoint import hub_answers
from formats.files import one_line, open_regular, where
from tokenizer import chat_text, check_special_tokens, max_characters, texts_in

MESSAGES = ("conversations", "messages", "conversation")
QUESTIONS = ("question", "problem", "prompt")       # a text, or a list of messages
ANSWERS = ("response", "completion", "answer")      # the same
THOUGHTS = ("reasoning_content", "reasoning", "thinking")
ROLES = {
    "system": "system", "developer": "developer", "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "tool": "tool"}
NOT_READ = ("images", "image", "videos", "audios", "functions", "function_call")
PROGRESS_SECONDS = 30.0
MOST_REASONS = 30   # for dropping rows; a reason can name a role or keys that a row made up


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
        self.read = 0
        self.unusable = 0
        self.places = {}    # by reason: the first three places, and the count

    def usable(self, rows):
        """From pairs (place, row or UnusableRow), yield the usable ones. Count all of them."""
        for place, row in rows:
            self.read += 1
            if isinstance(row, UnusableRow):
                self.add(row, place)
            else:
                yield place, row

    def add(self, reason, place):
        """Count as dropped a row that usable() yielded before. reason: an UnusableRow."""
        self.unusable += not isinstance(reason, UnwantedRow)
        reason = str(reason)
        if reason not in self.places and len(self.places) >= MOST_REASONS:
            reason = "other reasons"
        places, count = self.places.get(reason, ([], 0))
        self.places[reason] = ([*places, str(place)][:3], count + 1)

    def counts(self):
        return {reason: count for reason, (_, count) in sorted(self.places.items())}

    def finish(self):
        """Print a line per reason. ValueError if no row is kept, or if more than half of the rows
        are unusable."""
        kept = self.read - sum(self.counts().values())
        if not self.read:
            raise ValueError(f"{where(self.source)!r} holds no rows")
        if not kept or self.unusable > self.read / 2:
            reason = max(self.places, key=self.counts().get)
            places, count = self.places[reason]
            raise ValueError(
                f"{where(self.source)}, {self.unit} {one_line(places[0], 50)}: {one_line(reason)}. "
                f"{count:,} of {self.read:,} rows are like this, and {kept:,} can be used")
        for reason, (places, count) in sorted(self.places.items()):
            dots = ", .." if count > 3 else ""
            places = one_line(", ".join(places))
            print(f"dropped {count:,}: {one_line(reason)} ({self.unit} {places}{dots})")


# --------------------------------------------------------------------------------------------------
# a row


def read_conversations(source, split="train", part=None):
    """Yield (place, Conversation or UnusableRow) for each row of a source.

    place: the line of a file of JSON lines, elsewhere the number of the row.
    """
    for place, row in read_rows(source, split, part):
        try:
            if isinstance(row, dict):
                row = conversation_of(row)
        except UnusableRow as reason:
            row = reason
        yield place, row


def conversation_of(row):
    """The Conversation in a row, or UnusableRow."""
    messages = listed(first_of(row, MESSAGES), "messages")
    if not messages:
        messages = as_messages(first_of(row, QUESTIONS), "user")
        if messages:
            messages += as_messages(first_of(row, ANSWERS), "assistant")
    if not messages:
        keys = ", ".join(sorted(row)[:5])
        raise UnusableRow(f"no conversation; keys: {keys}")
    for name in NOT_READ:
        if row.get(name):
            raise UnusableRow(f"{name}, which the target cannot read")
    messages = [read_message(message) for message in messages]
    roles = [message["role"] for message in messages]
    if "user" not in roles:
        raise UnusableRow("no message of a user")
    if isinstance(row.get("system"), str) and "system" not in roles:
        messages.insert(0, {"role": "system", "content": row["system"]})
    conversation = Conversation(
        messages, listed(row.get("tools"), "tools") or None, row.get("target_turns"),
        row.get("answer"), row.get("id"))
    try:
        for text in texts_in(list(conversation)):
            text.encode()
    except UnicodeEncodeError:
        raise UnusableRow("text that is not Unicode: a lone surrogate") from None
    except ValueError as error:
        raise UnusableRow(str(error)) from None
    turns = conversation.target_turns
    answers = conversation.answers()
    if turns is not None and not (isinstance(turns, list) and all(t in answers for t in turns)):
        raise UnusableRow("target_turns are not numbers of the assistant's messages")
    return conversation


def first_of(row, names):
    """The value of the first of these keys that a row has; None if it has none of them."""
    for name in names:
        if row.get(name) not in (None, "", []):
            return row[name]
    return None


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
    if isinstance(role, str) and role not in ROLES:
        raise UnusableRow(f"an unknown role, {role[:20]!r}")
    if message.get("function_call"):
        raise UnusableRow("function_call, the old form of tool_calls")
    calls = listed(message.get("tool_calls"), "tool_calls")
    if isinstance(content, list):
        content = joined_text(content)
    if content is None and calls:
        content = ""  # as engines do, because some templates would write "None"
    if not isinstance(role, str) or not isinstance(content, str):
        raise UnusableRow("a message without role and content")
    result = {"role": ROLES[role], "content": content}
    if calls:
        result["tool_calls"] = calls
    thought = first_of(message, THOUGHTS)
    if isinstance(thought, str):
        result["reasoning_content"] = thought
    elif thought is not None:
        raise UnusableRow("a thought that is not text")
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


# --------------------------------------------------------------------------------------------------
# a conversation and the chat template


def render(tokenizer, messages, tools, thinking, opens_answer=True):
    """chat_text() of a conversation. UnusableRow if the template refuses the conversation or leaves
    out a part of it, or if a text contains a special token."""
    refuse_special_tokens(tokenizer, [messages, tools])

    def text_of(messages, tools):
        try:
            return chat_text(tokenizer, messages, thinking, tools, opens_answer)
        except ValueError as error:
            kind = type(error.__cause__).__name__
            return UnusableRow(f"refused by the chat template ({kind})")

    text = text_of(messages, tools)
    if isinstance(text, UnusableRow):
        parsed = parse_arguments(messages)
        if parsed != messages:
            return render(tokenizer, parsed, tools, thinking, opens_answer)
        raise text

    # every tool, every call of one, and every message of a rare role must make a difference
    if tools and text_of(messages, None) == text:
        raise UnusableRow("the chat template ignores tools")
    for i, message in enumerate(messages):
        before = messages[:i]
        after = messages[i + 1:]
        if message["role"] in ("developer", "tool") and text_of(before + after, tools) == text:
            raise UnusableRow(f"the chat template ignores the role {message['role']}")
        calls = message.get("tool_calls", [])
        for j in range(len(calls)):
            fewer_calls = message | {"tool_calls": calls[:j] + calls[j + 1:]}
            if text_of([*before, fewer_calls, *after], tools) == text:
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


def refuse_special_tokens(tokenizer, value):
    """check_special_tokens() with an UnusableRow."""
    try:
        check_special_tokens(tokenizer, value)
    except ValueError as error:
        raise UnusableRow(str(error)) from None


def parse_arguments(value):
    """Messages with dicts for arguments that are JSON text. Engines do this too, because some
    templates take dicts only."""
    if isinstance(value, list):
        return [parse_arguments(inner) for inner in value]
    if not isinstance(value, dict):
        return value
    parsed = dict(value)
    for key, inner in value.items():
        if key != "arguments":
            parsed[key] = parse_arguments(inner)
        elif isinstance(inner, str):
            parsed[key] = parse_json(inner)
    return parsed


def prompt_ids(tokenizer, messages, tools, thinking, context):
    """chat_prompt() of a conversation; UnusableRow says why there is none. A text that cannot fit
    into the context is not tokenized, because that can take gigabytes."""
    text = render(tokenizer, messages, tools, thinking)
    if len(text) > max_characters(tokenizer, context):
        raise UnusableRow("longer than the target's context")
    return tokenizer.encode(text, add_special_tokens=False)


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
        raise ValueError(f"{where(source)!r} holds no .jsonl or .parquet file")
    return sorted(json_lines + parquet)


def read_file(path):
    """(number, row or UnusableRow) of a file's rows."""
    if path.endswith(".parquet"):
        return enumerate(map(without_nulls, read_parquet(path)), 1)
    with open_regular(path) as f:
        is_array = path.endswith(".json") and f.read(100).lstrip().startswith(b"[")
        if not is_array:
            return read_json_lines(path)
        f.seek(0)
        try:
            rows = parse_json(f.read())
        except UnusableRow as reason:
            raise ValueError(f"cannot read the JSON array {where(path)}: {reason}") from None
    return enumerate(map(as_row, rows), 1)


def read_json_lines(path):
    with open_regular(path) as f:
        for number, line in enumerate(f, 1):
            if line.strip():
                yield number, row_of_line(line)


def row_of_line(line):
    try:
        return as_row(parse_json(line))
    except UnusableRow as reason:
        return reason


def as_row(value):
    return value if isinstance(value, dict) else UnusableRow("not a JSON object")


def read_parquet(path):
    import pyarrow.parquet

    try:
        for batch in pyarrow.parquet.ParquetFile(open_regular(path)).iter_batches(1024):
            yield from batch.to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ValueError(f"cannot read {where(path)}: {one_line(error)}") from None


def without_nulls(value):
    """A value of a table without the keys that are null: a table gives every row the keys of all
    rows."""
    if isinstance(value, dict):
        return {key: without_nulls(inner) for key, inner in value.items() if inner is not None}
    if isinstance(value, list):
        return [without_nulls(inner) for inner in value]
    return value


def read_hub(name, split, part):
    try:
        is_offline = not hub_answers()
        if is_offline and not has_copy(name):
            raise ConnectionError
        import datasets  # here, because it takes a second, and local files do not need it

        if is_offline:
            datasets.config.HF_HUB_OFFLINE = True  # or it asks the hub again for half a minute
        yield from datasets.load_dataset(name, part, split=split)
    # Offline, unknown, gated, a broken copy: four libraries raise a dozen types of exceptions.
    except Exception as error:
        raise ValueError(f"no file {where(name)!r}, and the hub does not give such a data set "
                         f"({type(error).__name__}): copy its files here and give the path of "
                         "their folder instead") from None


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
        return tqdm(items, total=total, unit=unit)
    form = "{n_fmt} {unit}s in {elapsed}\n"
    if total:
        form = "{n_fmt} of {total_fmt} {unit}s in {elapsed}, {remaining} left\n"
    return tqdm(items, total=total, unit=unit, bar_format=form, mininterval=PROGRESS_SECONDS,
                delay=PROGRESS_SECONDS)
