"""stdout and stderr of a run: lines appear at once, and a closed pipe or terminal doesn't end the run."""

import io
import os
import sys


class LastingStream(io.TextIOWrapper):
    """Discards output after the stream was broken by `| head -1`, a killed `tee` or a closed terminal."""

    def write(self, text: str) -> int:
        try:
            return super().write(text)
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())
            return len(text)

    def flush(self) -> None:
        try:
            super().flush()
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.fileno())


def hold_streams() -> None:
    """Make stdout and stderr line-buffered and lasting. Leaves streams of a notebook, Spyder or an earlier call."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if type(stream) is io.TextIOWrapper:
            options = {"errors": "backslashreplace", "line_buffering": True}  # for consoles without Chinese
            lasting = LastingStream(stream.buffer, stream.encoding, **options)
            lasting.replaced = stream  # keep it: it would close the buffer when collected
            setattr(sys, name, lasting)
