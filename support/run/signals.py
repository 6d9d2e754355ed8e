"""Stop a run after its current step on Ctrl-C, SIGTERM, or SIGHUP (when the terminal is closed)."""

import contextlib
import os
import signal

from support.compute import processes

STOPS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]  # Windows has two


class StopSignal:
    """The first of these signals asks the loop to stop after its current step; a second one ends the process at once.
    A `with` block restores the earlier handlers at its end."""

    def __init__(self):
        self.received = 0
        self.earlier = {}  # handlers, by signal
        for number in STOPS:
            if number == signal.SIGINT or signal.getsignal(number) != signal.SIG_IGN:  # `nohup` ignores SIGHUP
                self.earlier[number] = signal.signal(number, self.receive)

    def receive(self, number, frame) -> None:
        again, self.received = self.received, number
        if processes.below_torchrun():  # torchrun sends again what the terminal has already sent
            return
        if again:
            os._exit(128 + number)
        with contextlib.suppress(OSError):  # the terminal may be gone
            os.write(2, b"\nstopping after this step; a second Ctrl-C stops at once, without a checkpoint\n")

    def __enter__(self) -> "StopSignal":
        return self

    def __exit__(self, *error) -> None:
        self.release()

    def release(self) -> None:
        """Restore the earlier handlers."""
        for number, handler in self.earlier.items():
            signal.signal(number, handler)
