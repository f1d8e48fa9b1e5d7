"""
The 500 problems of MATH-500 as prompts for bench.py: JSON lines with the known answer and the
question, followed by the suffix that asks for a boxed answer.

    python data/math500/prepare.py                      # from the hub: HuggingFaceH4/MATH-500, test
    python data/math500/prepare.py --source=test.jsonl  # from a copy of its file
"""
import json
import os
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from checkpoint import write_whole
from configurator import configure
from data.questions import SUFFIX
from data.rows import Dropped, UnusableRow, read_rows

source = "HuggingFaceH4/MATH-500"                           # hub id, file of JSON lines or parquet
out = os.path.join(ROOT, "data", "math500", "test.jsonl")   # where the prompts go


def main(argv=None):
    config = configure(globals(), argv)
    try:
        count = prepare(config.source, config.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"{config.out}: {count:,} prompts")


def prepare(source, out):
    """Write the prompts; returns their number."""
    lines = []
    dropped = Dropped(source)
    for place, row in read_rows(source, "test"):
        if isinstance(row, UnusableRow):
            dropped.add(row, place)
        elif not isinstance(row.get("problem"), str) or not isinstance(row.get("answer"), str):
            dropped.add(UnusableRow("no text under problem and answer"), place)
        else:
            dropped.add(None, place)
            prompt = {"question": row["problem"] + SUFFIX, "answer": row["answer"]}
            lines.append(json.dumps(prompt) + "\n")
    dropped.check()
    dropped.print_report()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_whole(out, "".join(lines))
    return len(lines)


if __name__ == "__main__":
    main()
