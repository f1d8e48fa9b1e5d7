"""
The 500 problems of MATH-500 as prompts for bench.py: JSON lines of question, with the suffix that asks for a boxed
answer, and the known answer.

    python data/math500/prepare.py                              # from the hub: HuggingFaceH4/MATH-500, split test
    python data/math500/prepare.py --source=test.jsonl          # from a copy of its file
"""
import json
import os
import sys

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
sys.path[:0] = [ROOT]  # the project's modules, from whatever folder this is run
from configurator import configure
from data.rows import read_source

source = "HuggingFaceH4/MATH-500"                           # hub id, or file of JSON lines or parquet
out = os.path.join(ROOT, "data", "math500", "test.jsonl")   # where the prompts go

SUFFIX = "\nPlease reason step by step, and put your final answer within \\boxed{}."


def prepare():
    """Write the prompts, whole or not at all; returns their number."""
    lines = []
    for number, row in enumerate(read_source(source, "test"), 1):
        if not isinstance(row.get("problem"), str) or not isinstance(row.get("answer"), str):
            raise ValueError(f"{source}, row {number}: no text under problem and answer")
        lines.append(json.dumps({"question": row["problem"] + SUFFIX, "answer": row["answer"]}) + "\n")
    if not lines:
        raise ValueError(f"{source!r} holds no problems")
    os.makedirs(os.path.dirname(os.path.abspath(out)), exist_ok=True)
    with open(out + ".tmp", "w") as f:
        f.writelines(lines)
    os.replace(out + ".tmp", out)
    return len(lines)


def main():
    configure(globals())
    try:
        print(f"{out}: {prepare():,} prompts")
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
