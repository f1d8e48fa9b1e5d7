"""Configuration: a script's keys, what files and flags set, and every way to get it wrong."""
import os
import shlex
import subprocess
import sys

import pytest

from configurator import configure
from tests.common import ROOT

SCRIPT = '''"""
Trains a thing.

    python script.py --help
"""
import os
lr = 3e-4    # peak learning rate
steps = 100    # optimizer steps
compile = False    # torch.compile
prompt = "a # b"    # text; 'c' # d
limit: int | None = None    # prompts at most; None: all
revision: str | None = "main"
extra = None
ids = (3, 7)    # layers
betas = (0.9, 0.95)
names = ("q", "k")
free = ()
wide: tuple[int, ...] | None = None
out_dir = (
    "out"
)    # where checkpoints go
late: float = None
window = ("full", 128)
_hidden = 1
a, d = 1, 2
b = c = 3
N = 5
table = {}
def f():
    inner = 1
'''
KEYS = [
    "lr", "steps", "compile", "prompt", "limit", "revision", "extra", "ids", "betas", "names",
    "free", "wide", "out_dir", "late", "window",
]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """configure() over a fresh namespace of SCRIPT, as {key: value}.

    The command line is a string, as typed into a shell. Config files are given as name=text.
    """
    monkeypatch.chdir(tmp_path)

    def call(command_line="", **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "script.py").write_text(SCRIPT)
        namespace = {"__file__": "script.py", "__name__": "script"}
        exec(compile(SCRIPT, "script.py", "exec"), namespace)
        before = dict(namespace)
        config = configure(namespace, shlex.split(command_line))
        assert namespace == before, "configure() wrote into the script's globals"
        return vars(config)

    return call


def error_line(script, command_line, **files):
    with pytest.raises(SystemExit) as end:
        script(command_line, **files)
    # a string: printed to stderr, and exit status 1
    assert isinstance(end.value.code, str)
    assert "\n" not in end.value.code
    return end.value.code


def check_values(values, expected):
    """Equal and of the same type: 1 == 1.0 == True would pass otherwise."""
    for name, value in expected.items():
        assert values[name] == value
        assert type(values[name]) is type(value)


def test_config_defaults_in_source_order(script, capsys):
    """Keys that are not configuration (pairs, chains, constants), lost order, and noise."""
    assert list(script()) == KEYS
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("command_line, expected", (
    ("--compile --out-dir 'x y'", {"compile": True, "out_dir": "x y"}),
    ("--prompt=-a=b= --steps -1 --lr -.5", {"prompt": "-a=b=", "steps": -1, "lr": -0.5}),
    ("--compile 0", {"compile": False}),
    ("--compile=false", {"compile": False}),
    ("--compile True", {"compile": True}),
    ("--steps=1 --steps=2", {"steps": 2}),
    ("--lr=2", {"lr": 2.0}),
    ("--lr=1e-4", {"lr": 1e-4}),
    ("--prompt=1e-4", {"prompt": "1e-4"}),
    ("--prompt=None", {"prompt": "None"}),
    ("--prompt=", {"prompt": ""}),
    ("--prompt x.py", {"prompt": "x.py"}),
    ("""--prompt="'q'" """, {"prompt": "'q'"}),
    ("--ids=1", {"ids": (1,)}),
    ("--ids=[1,2]", {"ids": (1, 2)}),
    ("--ids -1,2", {"ids": (-1, 2)}),
    ("'--ids=()'", {"ids": ()}),
    ("--betas=1,0.5", {"betas": (1.0, 0.5)}),
    ("'--names=a, b'", {"names": ("a", "b")}),
    ("--names=a,", {"names": ("a",)}),
    ("""--names="('a', 'b')" """, {"names": ("a", "b")}),
    ("""--free="1,'x',2.5" """, {"free": (1, "x", 2.5)}),
    ("--wide=1,2", {"wide": (1, 2)}),
    ("--wide=None", {"wide": None}),
    ("""--window="'full',64" """, {"window": ("full", 64)}),
    ("--limit=3 --limit none", {"limit": None}),
    ("--revision=None", {"revision": None}),
    ("--revision=7", {"revision": "7"}),
    ("--late=1", {"late": 1.0}),
    ("'--extra=(1, 2)'", {"extra": (1, 2)}),
    ("'--extra=a b'", {"extra": "a b"}),
))
def test_config_values(script, command_line, expected):
    """A bool that eats the next word, strings evaluated as Python, '--ids=1' an int, an empty name
    after a last comma."""
    check_values(script(command_line), expected)


def test_config_values_of_files(script):
    """A file that beats a flag; a first file that beats a second; helpers taken for keys."""
    values = script("--compile c.py", c="steps = 1")
    check_values(values, {"compile": True, "steps": 1})

    first = "lr = 2 ** -3\nsteps = 5\n"
    second = "steps = 6\nids = [1, 2]\n"
    values = script("--lr=1 a.py b.py", a=first, b=second)
    check_values(values, {"lr": 1.0, "steps": 6, "ids": (1, 2)})

    helpers = """
import json
from math import sqrt
def f(): return 4
_two = 2
steps = f() * _two
lr = sqrt(4)
"""
    check_values(script("c.py", c=helpers), {"steps": 8, "lr": 2.0})


@pytest.mark.parametrize("command_line, hint", (
    ("--step=5", "command line: unknown key 'step', the nearest is 'steps'; --help"),
    ("--compile yes", "stray 'yes'"),
    ("5", "stray '5'"),
    ("-x.py", "stray '-x.py'"),
    ("''", "stray ''"),
    ("--lr", "--lr needs a value"),
    ("--lr --compile", "--lr needs a value"),
    ("--prompt -", "needs a value"),
    ("--", "unknown key"),
    ("--_hidden=1", "unknown key"),
    ("--N=1", "unknown key"),
    ("--inner=1", "unknown key"),
    ("--lr=fast", "command line: lr = 'fast' is str, expected float"),
    ("--lr=None", "lr"),
    ("--lr=True", "lr"),
    ("--steps=1.5", "steps"),
    ("--steps=True", "steps"),
    ("--steps=1e3", "steps"),
    ("--steps=", "steps"),
    ("--compile=2", "compile"),
    ("--compile=None", "compile"),
    ("--limit=1.5", "NoneType or int"),
    ("--ids=1,x", "ids"),
    ("--ids=1,2.5", "tuple of int"),
    ("--ids=1,True", "tuple of int"),
    ("--window=full,64", "tuple of"),
    ("'--names=(1, 2)'", "tuple of str"),
    ("--betas=1,None", "tuple of float"),
    ("none.py", "none.py: no such config file; config/ has those that ship"),
))
def test_config_mistakes(script, command_line, hint):
    """A typo or a wrong type that passes, and costs a run with the default; a traceback."""
    assert hint in error_line(script, command_line)


@pytest.mark.parametrize("text, hint", (
    ("lrr = 1e-3\n", "bad.py: unknown key 'lrr', the nearest is 'lr'; --help lists all; a helper"),
    ("steps = '9'", "bad.py: steps = '9' is str, expected int"),
    ("compile = 1", "bad.py: "),
    ("steps = True", "bad.py: "),
    ("prompt = None", "bad.py: "),
    ("ids = 3", "bad.py: "),
    ("import os as lr", "bad.py: "),
    ("extra = {}", "bad.py: "),
    ("lr = 1\nsteps = = 2\n", "bad.py, line 2: SyntaxError"),
    ("exit()", "bad.py, line 1: SystemExit"),
    ("import json\nlr = json.loads('{')\n", "bad.py, line 2: JSONDecodeError"),
    ("def f():\n    raise ValueError('a\\nb')\nf()\n", "bad.py, line 2: ValueError: a b"),
))
def test_config_mistakes_in_files(script, text, hint):
    """A typo or a wrong type in a file that passes; a broken file that ends in a traceback."""
    assert hint in error_line(script, "bad.py", bad=text)


def test_config_prints_where_values_come_from(script, capsys):
    """Overrides that go unreported."""
    script("--lr=1 one.py two.py", one="lr = 0.5\nsteps = 5\n", two="steps = 6\n")
    assert capsys.readouterr().out.splitlines() == [
        "one.py: lr = 0.5",
        "one.py: steps = 5",
        "two.py: steps = 6",
        "command line: lr = 1.0",
    ]


def test_config_second_call_keeps_types(tmp_path):
    """Type or default of a None key taken from what an earlier call in the process was given."""
    path = tmp_path / "s.py"
    path.write_text("extra = None\nlimit: int | None = None\n")
    namespace = {"__file__": str(path), "extra": None, "limit": None}
    configure(namespace, ["--extra=1", "--limit=2"])
    config = configure(namespace, ["--extra=word"])
    assert vars(config) == {"extra": "word", "limit": None}
    config = configure(namespace, ["--limit=None"])
    assert vars(config) == {"extra": None, "limit": None}


@pytest.mark.parametrize("flag", ("--help", "-h"))
def test_config_help(script, capsys, flag):
    """Comments cut at a '#' in a string or lost on a long assignment, missing keys, a failing
    status."""
    with pytest.raises(SystemExit) as end:
        script(f"--lr=1 {flag}")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Trains a thing.\n\n")
    rows = [line for line in out.splitlines() if line.startswith("  --")]
    assert len(rows) == len(KEYS)
    # one column of values and one of comments
    assert len({row.index(" = ") for row in rows}) == 1
    assert len({row.index("  # ") for row in rows if "  # " in row}) == 1
    for text in ("'a # b'", "# text; 'c' # d", "# where checkpoints go", "0.0003   "):
        assert text in out


def test_config_from_a_shell(tmp_path):
    """sys.argv not read; errors on stdout, with a traceback or a zero status."""
    (tmp_path / "run.py").write_text("""
from configurator import configure
x = 1    # one
def main(argv=None):
    config = configure(globals(), argv)
    print("x is", config.x, "by default", x)
main()
""")

    def shell(*args):
        environment = {**os.environ, "PYTHONPATH": ROOT}
        command = [sys.executable, "run.py", *args]
        return subprocess.run(
            command, cwd=tmp_path, env=environment, capture_output=True, text=True)

    assert shell("--x", "2").stdout == "command line: x = 2\nx is 2 by default 1\n"
    assert shell("--help").returncode == 0
    bad = shell("--y=2")
    assert bad.returncode == 1
    assert bad.stdout == ""
    assert bad.stderr.count("\n") == 1
    assert "'x'" in bad.stderr


def test_runs_ship_valid_configs():
    """A config file with a key or a type that train.py does not know: found at the start of a run
    of hours."""
    import train

    folder = os.path.join(ROOT, "config")
    paths = [os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".py")]
    assert len(paths) >= 4
    for path in paths:
        config = configure(vars(train), [path])
        # how vLLM knows the method
        assert os.path.basename(config.out_dir).endswith("dflash"), path
