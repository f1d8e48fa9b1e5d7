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


def run(config):
    paths = draw("logs")
    print(f"drew {', '.join(paths)} from {', '.join([ACCEPTANCE, *CURVES.values()])}")
    return {"command": "figures", "wrote": paths}, {}


def draw(folder):
    """acceptance.png, curve.png and decoding.gif in a folder; returns their paths."""
    names = ("acceptance.png", "curve.png", "decoding.gif")
    acceptance_path, curve_path, decoding_path = [os.path.join(folder, name) for name in names]
    report = read_report(ACCEPTANCE)
    pictures.acceptance(acceptance_path, report)
    animation.decoding(decoding_path, report)
    curves = {label: read_report(path)["rows"] for label, path in CURVES.items()}
    pictures.curve(curve_path, curves)
    return [acceptance_path, curve_path, decoding_path]


def read_report(path):
    with open(path) as f:
        return json.load(f)
