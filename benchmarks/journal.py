"""
The journal of a command: each row is kept on disk as soon as it is measured, so that a command
which was interrupted can go on with --resume.
"""
import json
import os

from checkpoint import write_whole


class Journal:
    """Rows of one command in OUT_DIR/NAME.part.jsonl, a line each, until all are there.

    The file's first line is the setup: what the rows were made from. ValueError when an earlier run
    had another one, as its rows would not fit.
    """

    def __init__(self, config, name, setup):
        self.path = os.path.join(config.out_dir, f"{name}.part.jsonl")
        setup = json.loads(json.dumps(setup))  # as it will be read back: tuples become lists
        lines = self.whole_lines(config.resume)
        self.rows = {}
        if not lines:
            self.append(setup)
            return
        self.check(json.loads(lines[0]), setup)
        for line in lines[1:]:
            row = json.loads(line)
            self.rows[row["prompt"]] = row

    def whole_lines(self, resume):
        """The lines of an earlier run, none without --resume. A torn last line, which a power cut
        leaves, is cut off."""
        with open(self.path, "ab+" if resume else "wb+") as f:
            f.seek(0)
            lines = [line for line in f if line.endswith(b"\n")]
            f.truncate(sum(map(len, lines)))
        return lines

    def check(self, before, now):
        """ValueError when the setups before and now differ in a key."""
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                raise ValueError(
                    f"{self.path} was made with {key} = {before.get(key)!r}, now it is "
                    f"{now.get(key)!r}: give the same keys, or another --out_dir, or no --resume")

    def append(self, row):
        with open(self.path, "a") as f:
            f.write(json.dumps(row) + "\n")

    def row(self, number, measure):
        """The row of that number: as it was kept, or as measure() makes it now."""
        row, = self.rows_of([number], lambda missing: [measure()])
        return row

    def rows_of(self, numbers, measure):
        """The rows of these numbers: as they were kept, and the others as measure(their numbers)
        makes them now, all at once."""
        missing = [number for number in numbers if number not in self.rows]
        if missing:
            for number, row in zip(missing, measure(missing), strict=True):
                self.rows[number] = {"prompt": number} | row
                self.append(self.rows[number])
        return [self.rows[number] for number in numbers]

    def close(self, rows):
        """All is measured: `rows`, in the form that readers want, become OUT_DIR/NAME.jsonl."""
        lines = [json.dumps(row) + "\n" for row in rows]
        write_whole(self.path.replace(".part.", "."), "".join(lines))
        os.remove(self.path)
