"""
The animation: the target alone writes an answer token by token, and next to it drafter and target
write the same answer in rounds. Both sides show the logged times, slowed down by the same factor,
so the ratio of their times is the true one.
"""
import os

from PIL import Image, ImageDraw, ImageFont

WIDTH = 1000               # of a frame, in pixels
HEIGHT = 270
COLUMN = 500               # where the right half begins
CLOCK = 120                # where the times are
ANSWER = 156               # where the answers begin
MARGIN = 24
LINE = 24                  # height of a line of text
FRAME_MS = 80              # duration of a frame
PAUSE_MS = 5000            # duration of the last frame
INK = "#24292f"
GREEN = "#1a7f37"          # accepted guesses of the drafter
BLUE = "#0550ae"           # the target's own tokens
LEGEND = "green: the drafter's accepted guesses   blue: the target's own tokens"


def decoding(path, report, slowdown=20):
    """An animated GIF of the transcript in a report of bench.py's acceptance."""
    transcript = report["transcript"]
    first = (transcript["first"], BLUE)  # the prefill's token, with which both sides begin
    sides = (("the target alone", 0, transcript["steps"]),
             ("with the drafter", COLUMN, transcript["rounds"]))
    ends = [sum(entry["seconds"] for entry in entries) for _, _, entries in sides]
    setup = report["setup"]
    text = [transcript["question"], LEGEND,
            f"a logged run of {setup['target']}, {setup['device']}, {setup['dtype']}; shown "
            f"{slowdown} times slower; the same answer, {ends[0] / ends[1]:.1f} times as fast"]
    from matplotlib import get_data_path  # here, because the import takes long
    fonts = os.path.join(get_data_path(), "fonts", "ttf")
    font = ImageFont.truetype(os.path.join(fonts, "DejaVuSansMono.ttf"), 15)

    frames = []
    for number in range(int(1000 * slowdown * max(ends) / FRAME_MS) + 2):
        now = number * FRAME_MS / 1000 / slowdown
        frame = Image.new("RGB", (WIDTH, HEIGHT), "white")
        draw = ImageDraw.Draw(frame)
        draw.text((MARGIN, MARGIN), "\n".join(text), INK, font, spacing=8)
        for (title, left, entries), end in zip(sides, ends):
            pieces = pieces_at(first, entries, now)
            milliseconds = 1000 * min(now, end)
            clock = f"{title}: {len(pieces) - 1} tokens in {milliseconds:4.0f} ms"
            draw.text((left + MARGIN, CLOCK), clock, INK, font)
            draw_pieces(draw, left + MARGIN, pieces, font)
        frames.append(frame)
    save(path, frames)


def draw_pieces(draw, left, pieces, font):
    """Pieces of text in their colors, letter by letter. All letters have the same width."""
    x = left
    y = ANSWER
    for text, color in pieces:
        for letter in text:
            if letter == "\n":
                x = left
                y += LINE
            else:
                draw.text((x, y), letter, color, font)
                x += font.getlength(letter)


def pieces_of(entry):
    """A piece for each token: the accepted guesses, then the target's own token. A step of the
    target alone has one token and no guesses."""
    if "text" in entry:
        return [(entry["text"], BLUE)]
    pieces = []
    for place, text in enumerate(entry["texts"]):
        is_guess = place < entry["accepted"]
        pieces.append((text, GREEN if is_guess else BLUE))
    return pieces


def pieces_at(first, entries, now):
    """The answer after `now` seconds: the prefill's token, then all tokens of finished entries."""
    pieces = [first]
    for entry in entries:
        now -= entry["seconds"]
        if now < 0:
            break
        pieces += pieces_of(entry)
    return pieces


def save(path, frames):
    """Frames as a GIF that repeats, with 64 colors of the last frame."""
    palette = frames[-1].quantize(64, Image.Quantize.MAXCOVERAGE)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    durations = [FRAME_MS] * (len(frames) - 1) + [PAUSE_MS]
    frames[0].save(path + ".tmp", format="GIF", save_all=True, append_images=frames[1:],
                   duration=durations, loop=0)
    os.replace(path + ".tmp", path)
