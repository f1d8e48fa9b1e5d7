"""
Files and text from outside: written completely or not at all, read and printed without surprises.
"""
import contextlib
import json
import os
import re
import secrets

LINE = 199  # characters of an error message at most

# Characters that a terminal obeys instead of showing them: control characters, line separators, and
# marks that reverse the direction of text. Also halves of characters, which cannot be printed.
UNPRINTABLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


def printable(text):
    """Text from a file or a server for the terminal: an escape sequence shows as \\x1b[..."""
    return UNPRINTABLE.sub(lambda match: match[0].encode("unicode_escape").decode(), str(text))


def one_line(text, limit=150):
    """An error or other text from outside as one printable line of at most `limit` characters."""
    line = printable(" ".join(str(text).split()))
    return line if len(line) <= limit else line[:limit - 3] + "..."


def short(value, limit=50):
    """A value from a file for an error message: quotes show that it is text."""
    return one_line(repr(value), limit)


def where(path, limit=50):
    """A path for an error message: its end, because the end tells files apart."""
    path = printable(path)
    return path if len(path) <= limit else "..." + path[3 - limit:]


def open_regular(path):
    """open(path, "rb"). ValueError unless it is a regular file: a pipe would never open."""
    if os.path.exists(path) and not os.path.isfile(path):
        raise ValueError(f"{where(path)} is not a regular file")
    return open(path, "rb")


def read_json(path):
    """The object in a JSON file. ValueError if the file contains anything else, or is broken."""
    with open_regular(path) as f:
        try:
            content = json.load(f)
        except RecursionError:
            raise ValueError("it is nested too deeply") from None
    if not isinstance(content, dict):
        raise ValueError(f"it contains a {type(content).__name__} instead of keys and values")
    return content


@contextlib.contextmanager
def whole_file(path):
    """A binary file to write. It appears as `path` when it is complete, or not at all.

    Until then it has a name that nobody can guess, and it is opened exclusively. So a link that
    someone has put into the folder cannot direct the content to a different file.
    """
    part = f"{path}.{secrets.token_hex(8)}.tmp"
    try:
        with open(part, "xb") as f:
            yield f
            f.flush()
            os.fsync(f.fileno())  # otherwise an empty file can be left after a power failure
        os.replace(part, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.remove(part)
        raise


def write_whole(path, content):
    """Write a file of text or bytes, complete or not at all."""
    with whole_file(path) as f:
        if isinstance(content, str):
            content = content.encode()
        f.write(content)
