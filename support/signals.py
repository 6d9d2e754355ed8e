"""Ctrl-C and SIGTERM."""

import contextlib
import os
import signal

from support import meeting


class StopSignal:
    """Ctrl-C and SIGTERM ask the loop to stop after its step; a second one leaves at once."""

    def __init__(self):
        self.received = 0
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        if meeting.below_torchrun():  # which passes on what the terminal has sent already
            self.received = number
            return
        if self.received:
            os._exit(128 + number)
        self.received = number
        with contextlib.suppress(OSError):  # nobody may read it any more
            os.write(2, b"\nstopping after this step; once more leaves at once\n")

    def release(self) -> None:
        """Let signals end the process again, where nothing can be lost by it."""
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
