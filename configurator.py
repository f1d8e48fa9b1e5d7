"""
Plain variables as configuration: a script's lower-case top-level variables are keys that config files and flags set.

    python train.py config/nano.py --lr=1e-4 --out-dir runs/a --compile    # flags win over files, wherever they stand
    python train.py --help                                                 # every key with its default and its comment

A script calls configure(globals()) first in main(). A key takes its default's type or its annotation's: one type, or
one type | None. A name or a value that does not fit ends the run with one line that says where it stands.
"""
import ast, collections, difflib, io, os, re, sys, tokenize, traceback

NONE = type(None)
TYPES = {t.__name__: t for t in (int, float, bool, str, tuple)}
ANY = (*TYPES.values(), NONE)    # what a bare None default accepts
BOOLS = {"True": True, "true": True, "1": True, "False": False, "false": False, "0": False}
# kinds: types of the value, the main one first; elements: types inside a tuple, none listed: any
Key = collections.namedtuple("Key", "kinds elements default comment")

def script_keys(namespace):
    """{name: Key} of a script in source order; its syntax tree has the annotations, its tokens the comments."""
    with tokenize.open(namespace["__file__"]) as f:
        source = f.read()
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)    # a regex would take the '#' inside a string
    comments = {t.start[0]: t.string[1:].strip() for t in tokens if t.type == tokenize.COMMENT}
    keys = {}
    for node in ast.parse(source).body:
        if not isinstance(node, (ast.Assign, ast.AnnAssign)):
            continue
        name = "=".join(map(ast.unparse, getattr(node, "targets", None) or [node.target]))   # "a=b", "(a, b)": no name
        default = namespace.get(name, ...)
        if node.value is None or not name.islower() or name[0] == "_" or type(default) not in ANY:
            continue
        hint = ast.unparse(getattr(node, "annotation", node.value))
        if isinstance(node, ast.Assign) and hint != "None":    # a bare None's value may be an earlier call's
            hint = type(default).__name__
        words = re.findall(r"\w+", hint)
        main, *elements = [TYPES[w] for w in words if w in TYPES] or [None]
        kinds = (main, NONE) if "None" in words or default is None else (main,)
        elements = elements or (set(map(type, default)) if type(default) is tuple else ())
        comment = comments.get(node.end_lineno) or comments.get(node.lineno, "")
        keys[name] = Key(kinds if main else ANY, elements, default, comment)
    return keys

# -----------------------------------------------------------------------------

def find(name, keys, source, hint=""):
    """The Key of a name. A typo must not pass: it would cost a training run with the default."""
    if name not in keys:
        near = "".join(difflib.get_close_matches(name.lower(), keys, 1, cutoff=0))
        raise SystemExit(f"{source}: unknown key {name!r}, the nearest is {near!r}; --help lists all{hint}")
    return keys[name]

def parse(text, key):
    """A flag's text as a value. Text not of the key's type becomes what it looks like, and fit() refuses it."""
    main = key.kinds[0]
    if text in ("None", "none") and NONE in key.kinds:
        return None
    if main is str:
        return text    # strings are literal: a prompt "1e-4" is no number
    if main is bool and text in BOOLS:
        return BOOLS[text]
    if main is tuple and set(key.elements) == {str} and text[:1] not in ("", "(", "["):
        return tuple(map(str.strip, text.split(",")))
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError):
        return text
    return (value,) if main is tuple and not isinstance(value, (tuple, list)) else value

def fit(value, kinds, elements=()):
    """value as one of kinds, or TypeError: an int may stand for a float, a list for a tuple, a bool for no other."""
    if isinstance(value, (tuple, list)):
        value = tuple(fit(v, elements) for v in value) if elements else tuple(value)
    elif float in kinds and isinstance(value, (int, float)) and type(value) not in (bool, *kinds):
        value = float(value)
    if type(value) not in kinds:
        raise TypeError
    return value

# -----------------------------------------------------------------------------

def read_config(path, keys):
    """[(path, name, value)] of a file, run in a namespace that its imports, functions and _helpers do not leave."""
    if not os.path.isfile(path):
        raise SystemExit(f"{path}: no such config file")
    found = {"__file__": path, "__name__": "config"}
    try:
        with open(path, "rb") as f:
            exec(compile(f.read(), path, "exec"), found)
    except (Exception, SystemExit) as e:    # SystemExit too: exit() in a config would end the run as if all were well
        lines = [frame.lineno for frame in traceback.extract_tb(e.__traceback__) if frame.filename == path]
        line = lines[-1] if lines else getattr(e, "lineno", "?")    # no frame of its own: it did not compile
        raise SystemExit(f"{path}, line {line}: {type(e).__name__}: {' '.join(str(e).split())}")
    names = [n for n, v in found.items() if n[0] != "_" and (n in keys or isinstance(v, (*ANY, list)))]
    for name in names:
        find(name, keys, path, "; a helper variable starts with an underscore")
    return [(path, name, found[name]) for name in names]

def read_arguments(argv, keys):
    """argv as [config file], [("command line", name, value)]."""
    files, flags, words = [], [], list(argv)
    while words:
        word = words.pop(0)
        if word.endswith(".py") and word[0] != "-":
            files.append(word)
            continue
        if not word.startswith("--"):
            raise SystemExit(f"command line: stray {word!r}; config files end in .py, flags are --key=value")
        name, equals, text = word[2:].partition("=")
        name = name.replace("-", "_")
        key = find(name, keys, "command line")
        if not equals and key.kinds[0] is bool:
            text = words.pop(0) if words and words[0] in BOOLS else "True"
        elif not equals:
            if not words or re.match(r"-(?![\d.])", words[0]):    # nothing, or the next flag; -1 and -.5 are values
                raise SystemExit(f"command line: {word} needs a value; one that begins with '-' is given as {word}=-x")
            text = words.pop(0)
        flags.append(("command line", name, parse(text, key)))
    return files, flags

def configure(namespace, argv=None):
    """Sets keys in a script's globals() by argv (None: sys.argv[1:]) and prints each; returns {key: value} of all."""
    argv = sys.argv[1:] if argv is None else argv
    keys = script_keys(namespace)
    if "-h" in argv or "--help" in argv:
        print((namespace.get("__doc__") or "").strip().split("\n\n")[0])
        print("\nconfig files (*.py) and then flags (--key=value) set:")
        width = max(map(len, keys), default=0)
        for name, key in keys.items():
            print(f"  --{name:{width}} = {key.default!r:24}  {'# ' * bool(key.comment)}{key.comment}".rstrip())
        raise SystemExit(0)
    files, flags = read_arguments(argv, keys)
    for source, name, value in [item for path in files for item in read_config(path, keys)] + flags:
        kinds, elements, *_ = keys[name]
        try:
            namespace[name] = fit(value, kinds, elements)
        except TypeError:
            inside = " of " + " or ".join(e.__name__ for e in elements) if elements else ""
            expected = " or ".join(k.__name__ for k in reversed(kinds)) + inside    # "NoneType or tuple of int"
            raise SystemExit(f"{source}: {name} = {value!r} is {type(value).__name__}, expected {expected}")
        print(f"{source}: {name} = {namespace[name]!r}")
    return {name: namespace[name] for name in keys}
