"""Configuration: a script's keys, what files and flags set, and every way to get it wrong."""
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

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
limit: int | None = None    # maximum number of prompts
revision: str | None = "main"
ids = (3, 7)    # layers
betas = (0.9, 0.95)
names: tuple[str] = ()
wide: tuple[int, ...] | None = None
_hidden = 1
a, d = 1, 2
N = 5
table = {}
def f():
    inner = 1
'''
KEYS = ["lr", "steps", "compile", "prompt", "limit", "revision", "ids", "betas", "names", "wide"]


@pytest.fixture
def script(tmp_path, monkeypatch):
    """script(command line, name=text of a config file) configures SCRIPT; returns {key: value}."""
    monkeypatch.chdir(tmp_path)

    def call(command_line="", **files):
        for name, text in files.items():
            (tmp_path / f"{name}.py").write_text(text)
        (tmp_path / "script.py").write_text(SCRIPT)
        namespace = runpy.run_path("script.py")
        before = dict(namespace)
        config = configure(namespace, shlex.split(command_line))
        assert namespace == before, "configure() wrote into the script's globals"
        return vars(config)

    return call


def check_values(values, expected):
    """The keys of the script, in its order. 1 == 1.0 == True, so types are compared too."""
    assert list(values) == KEYS
    for name, value in expected.items():
        assert (values[name], type(values[name])) == (value, type(value))


@pytest.mark.parametrize("command_line, expected", (
    ("--compile --lr 2", {"compile": True, "lr": 2.0}),
    ("--compile=false --steps -1 --lr -.5", {"compile": False, "steps": -1, "lr": -0.5}),
    ("--steps=1 --steps=2 --prompt x.py", {"steps": 2, "prompt": "x.py"}),
    ("--lr=1e-4 --prompt=-a=b= --revision=7", {"lr": 1e-4, "prompt": "-a=b=", "revision": "7"}),
    ("--prompt=None --revision=None", {"prompt": "None", "revision": None}),
    ("--ids=1 --prompt=", {"ids": (1,), "prompt": ""}),
    ("'--ids=(-1, 2,)' --wide=[1,2]", {"ids": (-1, 2), "wide": (1, 2)}),
    ("'--ids=()' --betas=1,0.5", {"ids": (), "betas": (1.0, 0.5)}),
    ("--names=a,b --limit=3 --limit none", {"names": ("a", "b"), "limit": None}),
))
def test_config_values_of_flags(script, command_line, expected):
    """A flag takes the next flag for its value, a text is read as Python, '--ids=1' is an int."""
    check_values(script(command_line), expected)


def test_config_values_of_files(script, capsys):
    """A file beats a flag, the first file beats the second, a helper becomes a key, or the origin
    of a value is not reported."""
    one = """
import json
from math import sqrt
def f(): return 4
_two = 2
steps = f() * _two
lr = sqrt(4)
"""
    two = "steps = 6\nids = [1, 2]\nbetas = (1, 0.5)\n"
    values = script("--lr=1 one.py two.py", one=one, two=two)
    check_values(values, {"lr": 1.0, "steps": 6, "ids": (1, 2), "betas": (1.0, 0.5)})
    assert capsys.readouterr().out.splitlines() == [
        "one.py: steps = 8",
        "one.py: lr = 2.0",
        "two.py: steps = 6",
        "two.py: ids = (1, 2)",
        "two.py: betas = (1.0, 0.5)",
        "command line: lr = 1.0",
    ]


@pytest.mark.parametrize("command_line, file, hint", (
    ("--step=5", "", "command line: unknown key 'step', did you mean 'steps'? See --help"),
    ("--learning_rate=1", "", "command line: unknown key 'learning_rate'. See --help"),
    ("--compile yes", "", "stray 'yes'"),
    ("--lr --compile", "", "command line: --lr needs a value"),
    ("--lr=fast", "", "command line: lr = 'fast', expected float"),
    ("--lr=None", "", "lr = 'None', expected float"),
    ("--steps=1e3", "", "expected int"),
    ("--compile=2", "", "expected bool"),
    ("--ids=1,2.5", "", "expected tuple[int]"),
    ("--betas=1,None", "", "expected tuple[float]"),
    ("\x1b.py", "", r"\x1b.py: no such config file; config/ has those that ship"),
    ("bad.py", "raise ValueError('\x1b[2J')", r"bad.py, line 1: ValueError: \x1b[2J"),
    ("bad.py", "lrr = 1e-3", "bad.py: unknown key 'lrr', did you mean 'lr'? See --help"),
    ("bad.py", "steps = 1.5", "bad.py: steps = 1.5, expected int"),
    ("bad.py", "steps = True", "expected int"),
    ("bad.py", "prompt = None", "expected str"),
    ("bad.py", "ids = (1, True)", "expected tuple[int]"),
    ("bad.py", "import os as lr", "expected float"),
    ("bad.py", "exit()", "bad.py, line 1: SystemExit"),
    ("bad.py", "import json\nlr = json.loads('{')\n", "bad.py, line 2: JSONDecodeError"),
    ("bad.py", "def f():\n    raise ValueError('a\\nb')\nf()\n", "bad.py, line 2: ValueError: a b"),
))
def test_config_mistakes_end_in_one_line(script, command_line, file, hint):
    """A typo or a wrong type passes, and a run uses the default; a broken file ends in a
    traceback."""
    with pytest.raises(SystemExit) as end:
        script(command_line, bad=file)
    # a string: Python prints it to stderr and exits with status 1
    assert isinstance(end.value.code, str)
    assert end.value.code.isprintable()
    assert hint in end.value.code


@pytest.mark.parametrize("flag", ("--help", "-h"))
def test_config_help_lists_all_keys(script, capsys, flag):
    """A comment is cut at a '#' in a string, a key is missing, or the status is a failure."""
    with pytest.raises(SystemExit) as end:
        script(f"--lr=1 {flag}")
    assert end.value.code == 0
    out = capsys.readouterr().out
    assert out.startswith("Trains a thing.\n\n")
    assert "they run: use only files you have read" in out  # config files
    rows = [line for line in out.splitlines() if line.startswith("  --")]
    assert [row.split()[0] for row in rows] == [f"--{name}" for name in KEYS]
    for text in ("'a # b'", "# text; 'c' # d", "0.0003   ", "# maximum number of prompts"):
        assert text in out


RUN = """
from configurator import configure, survive_closed_output
lines = 20000
config = configure(globals())
survive_closed_output()
for i in range(config.lines):
    print(i, flush=i % 2 == 0)
open("report", "w").write(f"{lines} by default")
"""


def test_config_from_a_shell(tmp_path):
    """sys.argv is not read; an error goes to stdout or ends with status 0; `| head` ends a
    measurement of an hour in a traceback and without its report."""
    (tmp_path / "run.py").write_text(RUN)
    processes = []
    for flag in ("--lines=2", "--y=2", "--lines=20000"):
        processes.append(subprocess.Popen(
            [sys.executable, "run.py", flag], cwd=tmp_path, stdout=subprocess.PIPE,
            stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": ROOT}))
    good, bad, head = processes
    assert good.communicate() == ("command line: lines = 2\n0\n1\n", "")
    out, errors = bad.communicate()
    assert (bad.returncode, out) == (1, "")
    assert errors == "command line: unknown key 'y'. See --help\n"
    (tmp_path / "report").unlink()
    assert head.stdout.readline() == "command line: lines = 20000\n"
    head.stdout.close()
    assert (head.stderr.read(), head.wait()) == ("", 0)
    assert (tmp_path / "report").read_text() == "20000 by default"


RECIPE = {  # of Phase 1.2
    "lr": 3e-4, "batch_size": 2, "grad_accum_steps": 2, "max_length": 3072, "block_size": 16,
    "num_anchors": 512, "weighting": "decay", "gamma": 7.0, "optimizer": "adamw",
    "betas": (0.9, 0.999), "weight_decay": 0.0, "warmup": 0.04, "grad_clip": 1.0, "epochs": 1.0,
    "num_layers": 5, "num_heads": 8, "num_kv_heads": 2, "head_dim": 256, "intermediate_size": 3584,
    "target_layer_ids": (3, 7, 11, 15, 19), "mask_token_id": None, "target": "Qwen/Qwen3.5-0.8B"}


def test_shipped_config_files_fit_train_py():
    """A shipped config file has a key or a type that train.py does not know; Phase 1.2 is changed
    by a new default."""
    import train

    paths = sorted(Path(ROOT, "config").glob("*.py"))
    assert len(paths) >= 4
    for path in paths:
        config = vars(configure(vars(train), [str(path)]))
        assert config["out_dir"].endswith("dflash"), path  # how vLLM knows the method
        assert path.name != "phase1_2.py" or RECIPE.items() <= config.items()
