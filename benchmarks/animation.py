"""
The animation: one answer, written by the target alone, one token a step, and beside it in rounds of
drafter and target. Each frame shows what was there after the logged seconds, slowed down by one
factor on both sides; so the ratio of their times is the true one.
"""
import os
import textwrap
from typing import NamedTuple

from PIL import Image, ImageColor, ImageDraw, ImageFont

WIDTH = 1000               # of a frame, in pixels
COLUMN = 500               # where the right half begins
MARGIN = 24
LINE = 24                  # height of a line of text
FRAME_MS = 80              # a frame is shown so long
PAUSE_MS = 5000            # and the last one so long
INK = "#24292f"
FAINT = "#8c959f"
GREEN = "#1a7f37"          # accepted guesses of the drafter
BLUE = "#0550ae"           # the target's own tokens


def decoding(path, report, slowdown=20):
    """An animated GIF of the transcript in a report of bench.py's acceptance."""
    transcript = report["transcript"]
    first = (transcript["first"], BLUE)  # the token of the prefill, which both begin with
    steps = timeline(transcript["steps"], step_pieces)
    rounds = timeline(transcript["rounds"], round_pieces)
    stage = Stage(transcript["question"], report["setup"], slowdown, lines_of_text(first, steps))

    frames = []
    seconds = max(steps[-1].end, rounds[-1].end)
    for number in range(int(1000 * slowdown * seconds / FRAME_MS) + 2):
        now = number * FRAME_MS / 1000 / slowdown
        frame = stage.new_frame()
        stage.draw_half(frame, 0, "the target alone", "steps", first, steps, now)
        stage.draw_half(frame, COLUMN, "with the drafter", "rounds", first, rounds, now)
        frames.append(frame)
    stage.draw_result(frames[-1], steps, rounds)
    durations = [FRAME_MS] * (len(frames) - 1) + [PAUSE_MS]
    save(path, frames, durations)


# ------------------------------------------------------------------------------------------------
# what was there when


class Forward(NamedTuple):
    """What a forward of the target added to the answer, and when."""
    end: float        # seconds since the first one began
    pieces: list      # [(text, colour)]


def timeline(entries, pieces_of):
    """The Forwards of a transcript's steps or rounds, one after another."""
    forwards = []
    end = 0.0
    for entry in entries:
        end += entry["seconds"]
        forwards.append(Forward(end, pieces_of(entry)))
    return forwards


def step_pieces(step):
    return [(step["text"], BLUE)]


def round_pieces(one_round):
    """A piece for each token: accepted guesses, then the target's own, if the answer went on."""
    pieces = []
    for place, text in enumerate(one_round["texts"]):
        is_guess = place < one_round["accepted"]
        pieces.append((text, GREEN if is_guess else BLUE))
    return pieces


def pieces_at(first, forwards, now):
    """The answer as it was after `now` seconds: the prefill's token and all that was added."""
    pieces = [first]
    for forward in forwards:
        if forward.end <= now:
            pieces += forward.pieces
    return pieces


def lines_of_text(first, forwards):
    """How many lines a whole answer has."""
    text = ""
    for piece, _ in pieces_at(first, forwards, forwards[-1].end):
        text += piece
    return 1 + text.count("\n")


# ------------------------------------------------------------------------------------------------
# drawing


class Stage:
    """Where things stand in a frame, and how they are drawn."""

    def __init__(self, question, setup, slowdown, answer_lines):
        from matplotlib import get_data_path
        fonts = os.path.join(get_data_path(), "fonts", "ttf")
        self.font = ImageFont.truetype(os.path.join(fonts, "DejaVuSansMono.ttf"), 15)
        self.bold = ImageFont.truetype(os.path.join(fonts, "DejaVuSansMono-Bold.ttf"), 15)
        self.letter = self.font.getlength("x")  # all letters are as wide
        self.question = textwrap.wrap(question, int((WIDTH - 2 * MARGIN) / self.letter))
        self.footer = [
            "green: guesses of the drafter, accepted   blue: the target's own tokens",
            f"a logged run of {setup['target']}, {setup['device']}, {setup['dtype']}; "
            f"shown {slowdown} times slower"]
        self.clocks = MARGIN + (len(self.question) + 1) * LINE     # tops of the parts
        self.texts = self.clocks + 2.5 * LINE
        self.result = self.texts + (answer_lines + 1) * LINE
        self.legend = self.result + 1.5 * LINE
        self.height = int(self.legend + 2 * LINE + MARGIN / 2)

    def new_frame(self):
        """A frame with what stands still: the question and the legend."""
        frame = Image.new("RGB", (WIDTH, self.height), "white")
        draw = ImageDraw.Draw(frame)
        for row, line in enumerate(self.question):
            draw.text((MARGIN, MARGIN + row * LINE), line, INK, self.font)
        for row, line in enumerate(self.footer):
            draw.text((MARGIN, self.legend + row * LINE), line, FAINT, self.font)
        return frame

    def draw_half(self, frame, left, title, unit, first, forwards, now):
        """One way of decoding, as it was after `now` seconds."""
        draw = ImageDraw.Draw(frame)
        pieces = pieces_at(first, forwards, now)
        count = sum(forward.end <= now for forward in forwards)
        milliseconds = 1000 * min(now, forwards[-1].end)
        x = left + MARGIN
        draw.text((x, self.clocks), f"{title}: {milliseconds:4.0f} ms", INK, self.bold)
        counts = f"{len(pieces) - 1} tokens in {count} {unit}"  # the first is of none
        draw.text((x, self.clocks + LINE), counts, FAINT, self.font)
        self.write(draw, x, self.texts, pieces)

    def write(self, draw, left, y, pieces):
        """Coloured pieces of text; each begins where the one before ended."""
        x = left
        for text, color in pieces:
            for letter in text:
                if letter == "\n":
                    x = left
                    y += LINE
                else:
                    draw.text((x, y), letter, color, self.font)
                    x += self.letter

    def draw_result(self, frame, steps, rounds):
        """tau of this answer, and how many times faster it was written."""
        tokens = sum(len(forward.pieces) for forward in rounds)
        tau = tokens / len(rounds)
        ratio = steps[-1].end / rounds[-1].end
        text = f"tau = {tau:.1f} tokens a round; the same answer, {ratio:.1f} times as fast"
        ImageDraw.Draw(frame).text((MARGIN, self.result), text, INK, self.bold)


def save(path, frames, durations):
    """Frames as a GIF that repeats, with 64 colours: each ink in sixteen strengths on white."""
    colors = []
    for ink in (INK, FAINT, GREEN, BLUE):
        for strength in range(16):
            for channel in ImageColor.getrgb(ink):
                colors.append(255 - (255 - channel) * strength // 15)
    palette = Image.new("P", (1, 1))
    palette.putpalette(colors)
    frames = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    frames[0].save(path + ".tmp", format="GIF", save_all=True, append_images=frames[1:],
                   duration=durations, loop=0)
    os.replace(path + ".tmp", path)
