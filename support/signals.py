"""Ctrl-C, SIGTERM and, of a terminal that goes away, SIGHUP."""

import contextlib
import os
import signal

from support import meeting

STOPS = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: signal.SIG_DFL}  # with their usual meaning
if hasattr(signal, "SIGHUP"):  # which Windows lacks
    STOPS[signal.SIGHUP] = signal.SIG_DFL


class StopSignal:
    """These signals ask the loop to stop after its step; a second one leaves at once."""

    def __init__(self):
        self.received = 0
        for number in STOPS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # as below nohup
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
        for number, usual in STOPS.items():
            if signal.getsignal(number) == self.receive:
                signal.signal(number, usual)
