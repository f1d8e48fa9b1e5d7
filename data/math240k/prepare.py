"""
The data of Phase 1.2: 239,467 math problems with the answers of Qwen3.5-0.8B, from the hub.

    python data/math240k/prepare.py                     # train.py runs it if needed
    python data/math240k/prepare.py --source=DIR        # from a copy of the data set's files
    python data/math240k/prepare.py --target=DIR        # for a copy of the target

It runs data/conversations.py with these settings. Its flags win over the settings.
"""
import os
import sys

ROOT = os.path.abspath(os.path.join(os.path.dirname(__file__), "..", ".."))
sys.path.insert(0, ROOT)  # the project's modules, from any working directory
from data import conversations

SETTINGS = [
    "--source=Moonlight556/qwen3.5-0.8b-target-matched-math-240k",
    "--target=Qwen/Qwen3.5-0.8B",
    "--out_dir=" + os.path.join(ROOT, "data", "math240k"),
]


def main(argv=None):
    if argv is None:
        argv = sys.argv[1:]
    conversations.main(SETTINGS + argv)


if __name__ == "__main__":
    main()
