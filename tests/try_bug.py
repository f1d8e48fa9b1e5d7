"""
Does a test catch this bug? Puts bugs into copies of the project, one at a time, and runs tests
there. The project itself is never edited.

    python tests/try_bug.py loss.py "T - max_length" "T - max_length + 1" --tests=tests/test_loss.py
    python tests/try_bug.py bugs.tsv --jobs=2

A line of the file is `path<TAB>old text<TAB>new text`, with \\n for the end of a line. The old text
must be there exactly once. A fourth column can have pytest's arguments instead of --tests.
"""
import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "out")


class Bug(NamedTuple):
    path: str
    old: str
    new: str
    tests: list


def read_bugs(path, tests):
    """The bugs in a file, one per line."""
    bugs = []
    for number, line in enumerate(Path(path).read_text().splitlines(), 1):
        columns = line.replace("\\n", "\n").split("\t")
        if len(columns) not in (3, 4):
            sys.exit(f"error: {path}:{number} has {len(columns)} columns: give path, old, new")
        own_tests = shlex.split(columns.pop()) if len(columns) == 4 else tests
        bugs.append(Bug(*columns, own_tests))
    return bugs


def verdict(bug):
    """What happened to the bug: the test that caught it, SURVIVED, or why it could not be tried."""
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(shutil.copytree(ROOT, Path(folder, "project"), ignore=NOT_COPIED))
        file = copy / bug.path
        source = file.read_text()
        if source.count(bug.old) != 1:
            return f"NOT TRIED: the old text is there {source.count(bug.old)} times"
        file.write_text(source.replace(bug.old, bug.new))
        command = [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", *bug.tests]
        try:
            done = subprocess.run(command, cwd=copy, env=os.environ | {"OMP_NUM_THREADS": "1"},
                                  capture_output=True, text=True, timeout=1800)
        except subprocess.TimeoutExpired:
            return "caught: the tests did not end"
    if done.returncode == 0:
        return "SURVIVED"
    failed = re.search(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.MULTILINE)
    if not failed:
        return f"NOT TRIED: {done.stdout[-200:]}{done.stderr[-200:]}"
    return f"caught by {failed[1]}"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("bug", nargs="+", help="a file of bugs, or: path, old text, new text")
    parser.add_argument("--tests", nargs="*", default=[])
    parser.add_argument("--jobs", type=int, default=1)
    arguments = parser.parse_args()
    if len(arguments.bug) not in (1, 3):
        parser.error("give a file of bugs, or three texts: path, old, new")
    if len(arguments.bug) == 1:
        bugs = read_bugs(arguments.bug[0], arguments.tests)
    else:
        bugs = [Bug(*arguments.bug, arguments.tests)]
    verdicts = []
    with ThreadPoolExecutor(arguments.jobs) as pool:
        for bug, result in zip(bugs, pool.map(verdict, bugs)):
            verdicts.append(result)
            print(f"{result} | {bug.path}: {bug.old!r} -> {bug.new!r}", flush=True)
    print(f"{len(bugs)} bugs, {verdicts.count('SURVIVED')} survived")


if __name__ == "__main__":
    main()
