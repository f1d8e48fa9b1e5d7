"""
The pictures of README and docs, drawn from the reports in benchmarks/results/.
"""
import os

from benchmarks import bugs_page, pictures
from formats.files import read_json

RESULTS = "benchmarks/results"


def run(config):
    paths = draw("docs/img")
    print(f"drew {', '.join(paths)} from the reports in {RESULTS}")
    return {"wrote": paths}


def draw(folder):
    """Draw the three pictures in a folder. Returns their paths."""
    paths = [os.path.join(folder, f"{name}.png") for name in ("acceptance", "throughput", "bugs")]
    pictures.acceptance(paths[0], read_report("acceptance_nano.json"))
    pictures.throughput(paths[1], {
        "nano pair, two CPU cores": read_report("throughput_nano.json")["rows"],
        "0.8B shape, random weights, one H200": read_report("throughput_h200.json")["rows"]})
    pictures.bugs(paths[2], bugs_page.summaries(read_report("bugs_nano.json")))
    return paths


def read_report(name):
    return read_json(os.path.join(RESULTS, name))
