"""
Standard output that somebody may close early, as `| head` does.
"""
import os
import sys


class QuietOutput:
    """sys.stdout until its reader goes away. From then on, what is printed is dropped.

    Python's own would raise BrokenPipeError, and a measurement of an hour would end without its
    report.
    """

    def __init__(self, stream):
        self.stream = stream
        self.is_closed = False

    def write(self, text):
        self.attempt(self.stream.write, text)
        return len(text)

    def flush(self):
        self.attempt(self.stream.flush)

    def attempt(self, function, *arguments):
        try:
            function(*arguments)
        except BrokenPipeError:
            self.is_closed = True
            # The stream still holds what it could not write, and tries again when Python ends. So
            # its file descriptor now leads to nowhere.
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.stream.fileno())
            os.close(nowhere)

    def __getattr__(self, name):
        """isatty, encoding, fileno and all else are the stream's own."""
        return getattr(self.stream, name)


def survive_closed_output():
    """From here on a closed pipe behind sys.stdout ends no run."""
    if not isinstance(sys.stdout, QuietOutput):
        sys.stdout = QuietOutput(sys.stdout)
