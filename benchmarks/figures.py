"""
The pictures of README and docs, drawn from the reports in benchmarks/results/, and the table of
docs/bugs.md.
"""
import json
import os

from benchmarks import bugs_page, pictures

RESULTS = "benchmarks/results"
THROUGHPUTS = {  # label: report
    "nano pair, two CPU cores": "throughput_nano.json",
    "0.8B shape, random weights, one H200": "throughput_h200.json",
}


def run(config):
    paths = draw("docs/img")
    print(f"drew {', '.join(paths)} from the reports in {RESULTS}")
    bugs_page.write_table(read_report("bugs_nano.json"))
    print("wrote the table of docs/bugs.md")
    return {"command": "figures", "wrote": paths}, {}


def draw(folder):
    """Draw the three pictures in a folder. Returns their paths."""
    names = ("acceptance.png", "throughput.png", "bugs.png")
    paths = [os.path.join(folder, name) for name in names]
    acceptance_path, throughput_path, bugs_path = paths
    pictures.acceptance(acceptance_path, read_report("acceptance_nano.json"))
    throughputs = {label: read_report(name)["rows"] for label, name in THROUGHPUTS.items()}
    pictures.throughput(throughput_path, throughputs)
    pictures.bugs(bugs_path, bugs_page.summaries(read_report("bugs_nano.json")))
    return paths


def read_report(name):
    with open(os.path.join(RESULTS, name)) as f:
        return json.load(f)
