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
from configurator import configure
from data.questions import SUFFIX
from data.rows import Dropped, UnusableRow, read_rows
from formats.files import one_line, printable, write_whole

source = "HuggingFaceH4/MATH-500"                           # hub id, file of JSON lines or parquet
out = os.path.join(ROOT, "data", "math500", "test.jsonl")   # where the prompts go


def main(argv=None):
    config = configure(globals(), argv)
    try:
        count = prepare(config.source, config.out)
    except (ValueError, OSError) as error:
        sys.exit(f"error: {one_line(error)}")
    print(printable(f"{config.out}: {count:,} prompts"))


def prepare(source, out):
    """Write the prompts; returns their number."""
    lines = []
    dropped = Dropped(source)
    for place, row in dropped.usable(read_rows(source, "test")):
        if isinstance(row.get("problem"), str) and isinstance(row.get("answer"), str):
            prompt = {"question": row["problem"] + SUFFIX, "answer": row["answer"]}
            lines.append(json.dumps(prompt) + "\n")
        else:
            dropped.add(UnusableRow("no text under problem and answer"), place)
    dropped.finish()
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    write_whole(out, "".join(lines))
    return len(lines)


if __name__ == "__main__":
    main()
