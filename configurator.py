"""
Plain variables as configuration: the lower-case variables at the top of a script are its keys.

    python train.py config/nano.py --lr=1e-4 --out-dir runs/a --compile
    python train.py --help                  # every key with its default and its comment

A script's main() begins with `config = configure(globals())` and then reads config.lr and so on.
A config file is Python that assigns to keys. Flags win over files, wherever they stand.
A key has the type of its default or of its annotation: one type, or one type | None. A name or a
value that does not fit ends the run with one line that says where it stands.
"""
import ast
import difflib
import io
import os
import re
import sys
import tokenize
import traceback
from types import NoneType, SimpleNamespace
from typing import NamedTuple

TYPES = {"int": int, "float": float, "bool": bool, "str": str, "tuple": tuple}
ANY_TYPE = (*TYPES.values(), NoneType)  # what a key accepts whose default is a bare None
BOOLEANS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}


class Key(NamedTuple):
    """What a script says about one of its keys."""
    types: tuple            # that a value may have, the main one first
    element_types: tuple    # that the elements of a tuple may have; none listed: any
    default: object
    comment: str


def configure(namespace, argv=None):
    """A script's keys as a SimpleNamespace: its defaults, overridden by config files and flags.

    namespace is the script's globals(), which are only read. argv: sys.argv[1:] where it is None.
    """
    if argv is None:
        argv = sys.argv[1:]
    keys = script_keys(namespace)
    if "-h" in argv or "--help" in argv:
        print_help(namespace, keys)
        sys.exit(0)
    files, flags = read_arguments(argv, keys)
    overrides = []
    for path in files:
        overrides += read_config(path, keys)
    overrides += flags  # last, so that flags win

    values = {name: key.default for name, key in keys.items()}
    for source, name, value in overrides:
        types, element_types, *_ = keys[name]
        try:
            values[name] = convert(value, types, element_types)
        except TypeError:
            expected = " or ".join(kind.__name__ for kind in reversed(types))
            if element_types:  # "NoneType or tuple of int"
                expected += " of " + " or ".join(kind.__name__ for kind in element_types)
            given = type(value).__name__
            sys.exit(f"{source}: {name} = {value!r} is {given}, expected {expected}")
        print(f"{source}: {name} = {values[name]!r}")
    return SimpleNamespace(**values)


def read_arguments(argv, keys):
    """A command line as a list of config files and a list of ("command line", name, value)."""
    files = []
    flags = []
    words = list(argv)
    while words:
        word = words.pop(0)
        if word.endswith(".py") and not word.startswith("-"):
            files.append(word)
            continue
        if not word.startswith("--"):
            sys.exit(f"command line: stray {word!r}; config files end in .py, "
                     "flags are --key=value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        key = find_key(name, keys, "command line")
        if not equals and key.types[0] is bool:
            # --compile alone means True; the next word belongs to it only if it is a boolean
            has_value = words and words[0] in BOOLEANS
            text = words.pop(0) if has_value else "True"
        elif not equals:
            # the value is the next word, which must not be a flag; -1 and -.5 are values
            if not words or re.match(r"-(?![\d.])", words[0]):
                sys.exit(f"command line: {word} needs a value; one that begins with '-' "
                         f"is given as {word}=-x")
            text = words.pop(0)
        flags.append(("command line", name, parse(text, key)))
    return files, flags


def read_config(path, keys):
    """What a config file assigns to keys, a list of (path, name, value). It may also import
    modules, define functions and use helper variables, whose names begin with an underscore."""
    if not os.path.isfile(path):
        sys.exit(f"{path}: no such config file; config/ has those that ship")
    variables = {"__file__": path, "__name__": "config"}
    try:
        with open(path, "rb") as f:
            exec(compile(f.read(), path, "exec"), variables)
    # SystemExit too: an exit() in a config file would end the run as if all were well
    except (Exception, SystemExit) as error:
        # the file's innermost line in the traceback, which has none if the file does not compile
        frames = traceback.extract_tb(error.__traceback__)
        lines = [frame.lineno for frame in frames if frame.filename == path]
        line = lines[-1] if lines else getattr(error, "lineno", "?")
        message = " ".join(str(error).split())
        sys.exit(f"{path}, line {line}: {type(error).__name__}: {message}")
    assigned = []
    for name, value in variables.items():
        could_be_a_key = name in keys or isinstance(value, (*ANY_TYPE, list))
        if could_be_a_key and not name.startswith("_"):
            find_key(name, keys, path, "; a helper variable starts with an underscore")
            assigned.append((path, name, value))
    return assigned


def find_key(name, keys, source, hint=""):
    """The Key of a name. A misspelt name must not pass: the run would use the default."""
    if name not in keys:
        nearest = "".join(difflib.get_close_matches(name.lower(), keys, 1, cutoff=0))
        sys.exit(f"{source}: unknown key {name!r}, the nearest is {nearest!r}; "
                 f"--help lists all{hint}")
    return keys[name]


def parse(text, key):
    """The value of a flag's text. If it is not of the key's type, convert() refuses it later."""
    main_type = key.types[0]
    if text in ("None", "none") and NoneType in key.types:
        return None
    if main_type is str:
        return text  # taken literally: a prompt "1e-4" is no number
    if main_type is bool and text in BOOLEANS:
        return BOOLEANS[text]
    if main_type is tuple and set(key.element_types) == {str} and text[:1] not in ("", "(", "["):
        words = text.removesuffix(",").split(",")  # --names=a,b without quotes; also --names=a,
        return tuple(word.strip() for word in words)
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
    if main_type is tuple and not isinstance(value, (tuple, list)):
        return (value,)  # --ids=1 without a comma
    return value


def convert(value, types, element_types=()):
    """value as one of types, else TypeError: an int may stand for a float, a list for a tuple."""
    if isinstance(value, (tuple, list)):
        if element_types:
            value = [convert(element, element_types) for element in value]
        value = tuple(value)
    # a bool is no number here, although Python counts it as an int
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if is_number and float in types and type(value) not in types:
        value = float(value)
    if type(value) not in types:
        raise TypeError
    return value


def script_keys(namespace):
    """{name: Key} of a script in the order of its source. Values come from its namespace,
    annotations from its syntax tree, comments from its tokens."""
    with tokenize.open(namespace["__file__"]) as f:
        source = f.read()
    comments = {}  # by line; a search for '#' would also find those inside strings
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string[1:].strip()
    keys = {}
    for statement in ast.parse(source).body:
        if isinstance(statement, ast.AnnAssign) and statement.value is not None:
            name = ast.unparse(statement.target)
            annotation = ast.unparse(statement.annotation)
        elif isinstance(statement, ast.Assign) and len(statement.targets) == 1:
            name = ast.unparse(statement.targets[0])  # of a pair "(a, b)", which is no key
            annotation = ""
        else:
            continue
        default = namespace.get(name, ...)
        if name.islower() and not name.startswith("_") and type(default) in ANY_TYPE:
            types, element_types = key_types(annotation, default)
            comment = comments.get(statement.end_lineno) or comments.get(statement.lineno, "")
            keys[name] = Key(types, element_types, default, comment)
    return keys


def key_types(annotation, default):
    """(types, element types) of a key, by its annotation if it has one, else by its default."""
    words = re.findall(r"\w+", annotation or type(default).__name__)
    main_type, *element_types = [TYPES[word] for word in words if word in TYPES] or [None]
    if main_type is None:
        return ANY_TYPE, ()
    if type(default) is tuple and not element_types:
        element_types = dict.fromkeys(map(type, default))  # each type once, in order
    if default is None or "None" in words:
        return (main_type, NoneType), tuple(element_types)
    return (main_type,), tuple(element_types)


def print_help(namespace, keys):
    """The first paragraph of the script's docstring, then a line for each key."""
    print((namespace.get("__doc__") or "").strip().split("\n\n")[0])
    print("\nconfig files (*.py) and then flags (--key=value) set:")
    width = max(map(len, keys), default=0)
    for name, key in keys.items():
        comment = key.comment and f"# {key.comment}"
        print(f"  --{name:{width}} = {key.default!r:24}  {comment}".rstrip())
