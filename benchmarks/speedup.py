"""
How much faster decoding is with a drafter than the target alone in its fastest mode, prompt by
prompt. The modes run in one process in alternating order after a warm-up, and each prompt's time is
the median of three repeats. Every round is timed, including the first draft. The prefill is not.
"""
from statistics import geometric_mean, median

from benchmarks.common import measure_decoding, print_figures, tokens_per_second, write_rows

REPEATS = 3  # per prompt


def run(config):
    _, rows, report = measure_decoding(config, default_count=24, repeats=REPEATS)
    report |= gains_of(rows)
    write_rows(config, "speedup", rows)
    print_figures(report)
    return report


def gains_of(rows):
    """Figures of the speedups of all prompts, which are added to the rows. An answer that ended
    with its first token has none, because there was no round."""
    gains = []
    for row in rows:
        row["speedup"] = None
        if row["speculative"]["rounds"] and row["target"]["rounds"]:
            speed = tokens_per_second([row], "speculative")
            row["speedup"] = speed / tokens_per_second([row], "target")
            gains.append(row["speedup"])
    if not gains:
        raise ValueError("every answer ended with its first token, so there is no round to time: "
                         "use other prompts")
    return {"faster": sum(gain > 1 for gain in gains), "timed": len(gains),
            "geomean": geometric_mean(gains), "min": min(gains), "median": median(gains),
            "max": max(gains)}
