"""
The README's pictures, drawn from the reports in logs/.
"""
import json
import os

from benchmarks import animation, pictures

ACCEPTANCE = "logs/acceptance_nano.json"
CURVES = {  # label: report
    "nano pair, two CPU cores": "logs/curve_nano.json",
    "0.8B shape, random weights, one H200": "logs/curve_h200.json",
}
THROUGHPUTS = {  # label: report
    "nano pair, one CPU thread": "logs/throughput_nano.json",
    "0.8B shape, random weights, one H100": "logs/throughput_h100.json",
}


def run(config):
    paths = draw("logs")
    reports = [ACCEPTANCE, *CURVES.values(), *THROUGHPUTS.values()]
    print(f"drew {', '.join(paths)} from {', '.join(reports)}")
    return {"command": "figures", "wrote": paths}, {}


def draw(folder):
    """acceptance.png, curve.png, decoding.gif and throughput.png in a folder; returns their paths.
    """
    names = ("acceptance.png", "curve.png", "decoding.gif", "throughput.png")
    paths = [os.path.join(folder, name) for name in names]
    acceptance_path, curve_path, decoding_path, throughput_path = paths
    report = read_report(ACCEPTANCE)
    pictures.acceptance(acceptance_path, report)
    animation.decoding(decoding_path, report)
    curves = {label: read_report(path)["rows"] for label, path in CURVES.items()}
    pictures.curve(curve_path, curves)
    throughputs = {label: read_report(path)["rows"] for label, path in THROUGHPUTS.items()}
    pictures.throughput(throughput_path, throughputs)
    return paths


def read_report(path):
    with open(path) as f:
        return json.load(f)
