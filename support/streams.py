"""stdout and stderr that last as long as the run."""

import io
import os
import sys

from support.errors import escaped


class Lasting(io.RawIOBase):
    """What is below a text stream, where that may break: `| head -1`, a closed terminal, a full disk behind `>`.
    What it cannot take is lost."""

    def __init__(self, stream: io.TextIOWrapper):
        self.stream = stream  # which would close what is below it when nobody holds it any more
        self.raw = getattr(stream.buffer, "raw", stream.buffer)  # python -u has no buffer between

    def write(self, data) -> int | None:
        try:
            return self.raw.write(data)
        except OSError:
            return len(data)

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self.raw.fileno()

    def isatty(self) -> bool:
        return self.raw.isatty()


class Plain(io.TextIOWrapper):
    """A text stream in which nothing printed steers the terminal, but for tqdm's returns to the start of a line, and
    which a reward's own code cannot close."""

    def write(self, text: str) -> int:
        super().write("\r" * text.startswith("\r") + escaped(text.removeprefix("\r"), but="\n\t"))
        return len(text)

    def close(self) -> None:
        self.flush()


def hold_streams() -> None:
    """Have nothing that befalls stdout or stderr end this process: neither what breaks them, nor a character that a
    console lacks, nor that one is closed from the start, where the next file opened would receive what is printed."""
    while os.open(os.devnull, os.O_RDWR) <= 2:
        pass
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name) or open(descriptor, "w", encoding="utf-8")
        held = io.BufferedWriter(Lasting(stream))
        setattr(sys, name, Plain(held, stream.encoding, "backslashreplace", line_buffering=True))
