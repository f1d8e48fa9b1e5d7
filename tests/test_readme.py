"""README.md and the pages: examples that fail, files that are gone, and links that lead nowhere."""
import glob
import os
import re
import runpy

import pytest

from tests.common import ROOT

PAGES = ["README.md", "CONTRIBUTING.md"]
for pattern in ("docs/*.md", "data/*/readme.md", "benchmarks/results/readme.md"):
    PAGES += glob.glob(pattern, root_dir=ROOT)


def read(page):
    with open(os.path.join(ROOT, page)) as f:
        return f.read()


def fences(page):
    """(language, text) of each fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", read(page), re.M | re.S)


def test_readme_python_example_runs(monkeypatch, tmp_path, capsys):
    """A reader pastes the example, and a name has changed."""
    example, = [text for language, text in fences("README.md") if language == "python"]
    script = tmp_path / "example.py"
    script.write_text(example)
    monkeypatch.chdir(ROOT)
    runpy.run_path(str(script))
    assert r"\boxed{408}" in capsys.readouterr().out


def test_readme_tree_names_every_file_and_folder():
    """A file at the top level is missing from the tree, or a file in the tree is gone."""
    tree, = [text for _, text in fences("README.md") if text.startswith("basic.py")]
    named = {line.split()[0] for line in tree.splitlines()}
    expected = set(glob.glob("*.py", root_dir=ROOT))
    for folder in ("fast", "formats", "training", "benchmarks", "config", "data", "docs", "tests"):
        expected.add(f"{folder}/")
    assert named == expected


@pytest.mark.parametrize("page", PAGES)
def test_pages_name_commands_flags_and_files_that_exist(page):
    """A page tells readers to run a script or a flag that was renamed, or a link is dead."""
    text = read(page)
    folder = os.path.dirname(os.path.join(ROOT, page))
    for link in re.findall(r"\]\((?!https?:)([^)#]+)\)", text):
        assert os.path.exists(os.path.join(folder, link)), link
    for command in commands(text):
        script, *words = command.split()
        assert os.path.isfile(os.path.join(ROOT, script)), command
        source = read(script)
        if "from configurator import" not in source:  # another way to read its arguments
            continue
        for flag in re.findall(r" --(\w+)", " " + " ".join(words)):
            assert re.search(rf"(?m)^{flag}(:.*)? = ", source), f"{script} has no --{flag}"


def commands(text):
    """The commands with python or torchrun in a page, without comments and output redirection."""
    text = text.replace("\\\n", " ")
    found = []
    for match in re.finditer(r"(?:python|torchrun [^`\n]*?) ((?:\w+/)*\w+\.py\b[^`\n#]*)", text):
        found.append(match[1].split("&&")[0])
    return found
