"""
The table of `python bench.py speed`. A row has the time of ours, the floor that this machine sets
for it, the rate that it reached, and the time of a peer.
"""
from statistics import median
from typing import NamedTuple


class Work(NamedTuple):
    """What a row has to do, and at which rate this machine does such work at best."""
    amount: float       # bytes or operations
    unit: str           # "bytes" or "operations"
    best_rate: float    # of these a second


def report_row(name, seconds, work, peer_name=None, peer_seconds=None):
    """A row of the report, from the repeats of ours and, if there is one, of the peer.

    The floor is the work at the machine's best rate. The rate, under "bytes_per_s" or
    "operations_per_s", is the work over our time. The ratio is the median over pairs of repeats.
    A peer that has a name and no seconds did not run, and its name says why.
    """
    row = {"name": name, "seconds": median(seconds), "floor_seconds": work.amount / work.best_rate,
           f"{work.unit}_per_s": work.amount / median(seconds),
           "peer": peer_name, "peer_seconds": None, "ratio": None}
    if peer_seconds:
        row["peer_seconds"] = median(peer_seconds)
        row["ratio"] = median([peer / ours for ours, peer in zip(seconds, peer_seconds)])
    return row


def print_table(rows):
    print(f"{'':52} {'ms':>10} {'x floor':>8} {'rate':>16} {'peer ms':>10} {'ratio':>7}  peer")
    for row in rows:
        times_floor = row["seconds"] / row["floor_seconds"]
        line = f"{row['name']:52} {1e3 * row['seconds']:10.3f} {times_floor:8.2f}"
        line += f" {rate_text(row):>16}"
        if row["peer_seconds"]:
            line += f" {1e3 * row['peer_seconds']:10.3f} {row['ratio']:6.2f}x  {row['peer']}"
        elif row["peer"]:
            line += f" {'-':>10} {'-':>7}  {row['peer']}"
        print(line)
    for row in rows:
        if "kernel_seconds" in row:
            print(kernel_line(row))


def rate_text(row):
    """The rate that a row reached, in GB or 10^12 operations a second."""
    if "bytes_per_s" in row:
        return f"{row['bytes_per_s'] / 1e9:,.2f} GB/s"
    return f"{row['operations_per_s'] / 1e12:,.2f} TFLOP/s"


def kernel_line(row):
    """How much of a row's time its kernels take: the rest is the processor's."""
    above = row["seconds"] / row["kernel_seconds"] - 1
    return (f"{row['name']}: {row['kernels']:,} kernels take {1e3 * row['kernel_seconds']:.3f} ms; "
            f"the whole takes {above:.1%} more")
