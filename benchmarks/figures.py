"""
The pictures of README and docs, drawn from the reports in benchmarks/results/, and the tables of
docs/bugs.md and docs/troubleshooting.md.
"""
import json
import os

from benchmarks import animation, bugs_page, pictures

ACCEPTANCE = "benchmarks/results/acceptance_nano.json"
CURVES = {  # label: report
    "nano pair, two CPU cores": "benchmarks/results/curve_nano.json",
    "0.8B shape, random weights, one H200": "benchmarks/results/curve_h200.json",
}
THROUGHPUTS = {  # label: report
    "nano pair, two CPU cores": "benchmarks/results/throughput_nano.json",
    "0.8B shape, random weights, one H200": "benchmarks/results/throughput_h200.json",
}
BUGS = "benchmarks/results/bugs_nano.json"
NAMES = ("acceptance.png", "curve.png", "decoding.gif", "throughput.png", "bugs.png")


def run(config):
    paths = draw("docs/img")
    reports = [ACCEPTANCE, *CURVES.values(), *THROUGHPUTS.values(), BUGS]
    print(f"drew {', '.join(paths)} from {', '.join(reports)}")
    report = read_report(BUGS)
    bugs_page.rewrite("docs/bugs.md", bugs_page.tables(report))
    bugs_page.rewrite("docs/troubleshooting.md", bugs_page.table_of_failures(report))
    print(f"wrote the tables of docs/bugs.md and docs/troubleshooting.md from {BUGS}")
    return {"command": "figures", "wrote": paths}, {}


def draw(folder):
    """The five pictures of NAMES, in a folder; returns their paths."""
    paths = [os.path.join(folder, name) for name in NAMES]
    acceptance_path, curve_path, decoding_path, throughput_path, bugs_path = paths
    report = read_report(ACCEPTANCE)
    pictures.acceptance(acceptance_path, report)
    animation.decoding(decoding_path, report)
    curves = {label: read_report(path)["rows"] for label, path in CURVES.items()}
    pictures.curve(curve_path, curves)
    throughputs = {label: read_report(path)["rows"] for label, path in THROUGHPUTS.items()}
    pictures.throughput(throughput_path, throughputs)
    pictures.bugs(bugs_path, bugs_page.summaries(read_report(BUGS)))
    return paths


def read_report(path):
    with open(path) as f:
        return json.load(f)
