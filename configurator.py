"""
Configuration of a script: the plain lower-case variables at its top are its keys.

    python train.py config/nano.py --lr=1e-4 --out-dir runs/a --compile
    python train.py --help                  # every key with its default and its comment

main() calls config = configure(globals()) and reads config.lr. A config file is Python that assigns
to keys. Flags override it. A key has the type of its annotation, or without one the type of its
default. Types are int, float, bool, str, a tuple of one of these, or T | None.
"""
import os
import re
import runpy
import sys
import traceback
from difflib import get_close_matches
from types import SimpleNamespace

from formats.files import LINE, one_line, where

TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}
BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# a line of a script: name: annotation = default  # comment
KEY = re.compile(r"^([a-z][a-z0-9_]*)(?:: ([^=\n]+))? = .*?(?:  # (.*?))?[ ]*$", re.MULTILINE)


def configure(namespace, argv=None):
    """A script's keys with their values. namespace: globals(); argv: instead of sys.argv[1:]."""
    words = list(sys.argv[1:] if argv is None else argv)
    types, comments = script_keys(namespace)
    values = {name: namespace[name] for name in types}
    if "--help" in words or "-h" in words:
        print((namespace.get("__doc__") or "").strip().split("\n\n")[0])
        print("\nconfig files (they run: use only files you have read), then --key=value, set:")
        for name, default in values.items():
            print(f"  --{name:21} = {default!r:24}  {comments[name]}".rstrip())
        sys.exit(0)
    for source, name, value in read_command_line(words, types):
        if name not in types:  # a misspelled key, and the run would use the default
            near = [f", did you mean {x!r}?" for x in get_close_matches(name.lower(), types, 1)]
            sys.exit(f"{source}: unknown key {name!r:.60}{''.join(near) or '.'} See --help")
        try:
            values[name] = convert(value, types[name])
        except (ValueError, KeyError, OverflowError):
            sys.exit(f"{source}: {name} = {value!r:.60}, expected {types[name]}")
        print(f"{source}: {name} = {values[name]!r}")
    return SimpleNamespace(**values)


def script_keys(namespace):
    """({name: type}, {name: comment}) in the order of the source. A type is text: "tuple[int]"."""
    types = {}
    comments = {}
    with open(namespace["__file__"], encoding="utf-8") as f:
        keys = KEY.findall(f.read())
    for name, annotation, comment in keys:
        default = namespace.get(name, ...)
        if not annotation:
            annotation = type(default).__name__
            if annotation == "tuple":
                annotation = f"tuple[{type(default[0]).__name__}]"
        if re.match(r"\w+", annotation)[0] in TYPES:
            types[name] = annotation
            comments[name] = f"# {comment}" if comment else ""
    return types, comments


def read_command_line(words, types):
    """All settings as (source, name, value): first those of config files, then those of flags."""
    from_files = []
    from_flags = []
    while words:
        word = words.pop(0)
        if word.endswith(".py") and not word.startswith("-"):
            from_files += read_config_file(word, types)
            continue
        if not word.startswith("--"):
            sys.exit(f"command line: stray {word!r:.60}; use --key=value or a config file *.py")
        name, equals, value = word[2:].partition("=")
        name = name.replace("-", "_")
        if not equals and types.get(name) == "bool":
            value = "True"
        elif not equals:
            if name in types and (not words or words[0].startswith("--")):
                sys.exit(f"command line: {word} needs a value: {word}=...")
            value = words.pop(0) if words else ""
        from_flags.append(("command line", name, value))
    return from_files + from_flags


def read_config_file(path, types):
    """Yields the settings of a config file. Names of its helper variables begin with "_"."""
    if not os.path.isfile(path):
        sys.exit(f"{where(path)}: no such config file; config/ has those that ship")
    try:
        variables = runpy.run_path(path)
    except (Exception, SystemExit) as error:  # an exit() in the file would look like success
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")  # a SyntaxError has no frame
        sys.exit(one_line(f"{where(path)}, line {line}: {type(error).__name__}: {error}", LINE))
    for name, value in variables.items():
        is_plain = isinstance(value, (*TYPES.values(), list))  # not a module or a function
        if name in types or (is_plain and not name.startswith("_")):
            yield where(path), name, value


def convert(value, annotation):
    """A value, or the text of one, in the annotated type. An error if it does not fit."""
    kind, *rest = re.findall(r"\w+", annotation)
    if "None" in rest and value in (None, "None", "none"):
        return None
    if kind == "tuple":
        if isinstance(value, str):
            value = re.findall(r"[^\s,()\[\]]+", value)
        elif not isinstance(value, (tuple, list)):
            raise ValueError
        return tuple(convert(element, rest[0]) for element in value)
    if isinstance(value, str):
        return BOOLEANS[value] if kind == "bool" else TYPES[kind](value)
    if kind == "float" and type(value) is int:
        return float(value)
    if type(value) is not TYPES[kind]:
        raise ValueError
    return value


def check_ranges(config, ranges):
    """ValueError for a number outside of its range. ranges: {key: (lowest, highest)}."""
    for key, (lowest, highest) in ranges.items():
        value = getattr(config, key)
        for number in value if isinstance(value, tuple) else (value,):
            if number is not None and not lowest <= number <= highest:  # also if it is NaN
                raise ValueError(f"{key} = {value!r:.60}: use {lowest} to {highest}")


def survive_closed_output():
    """Drop prints once the reader of sys.stdout is gone (`| head`): the report must be written."""
    stream = sys.stdout
    write = stream.write

    def write_or_drop(text):
        try:
            write(text)
            stream.flush()
        except BrokenPipeError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())  # also for the flush at exit
        return len(text)

    stream.write = write_or_drop
