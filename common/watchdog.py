"""Ends a run that hangs, and says in what: a lost rank leaves the others waiting in a collective."""

import faulthandler
import os
import sys
import threading
import time

HUNG = 3  # the exit code


class Watchdog:
    """A thread that ends the process if no phase begins within timeout_s seconds of the one before.

    The process group's own timeout names a collective and its shapes, or, with nccl, none of both.

    Args: phases are announced by calling the object: watchdog("rollout 3, token 17").
    """

    def __init__(self, timeout_s, rank):
        self.timeout_s, self.rank = timeout_s, rank
        self.phase, self.since = "start", time.monotonic()
        self.closed = threading.Event()
        self.thread = threading.Thread(target=self._watch, daemon=True)
        self.thread.start()

    def __call__(self, phase):
        self.phase, self.since = phase, time.monotonic()

    def close(self):
        self.closed.set()
        self.thread.join()

    def _watch(self):
        while not self.closed.wait(min(1.0, self.timeout_s / 4)):
            phase, waited = self.phase, time.monotonic() - self.since
            if waited > self.timeout_s:
                print(
                    f"rank {self.rank}: {phase}: nothing has moved for {waited:.0f} s, over "
                    f"--collective_timeout_s {self.timeout_s}. Another rank is lost or hangs; or this phase "
                    "is only slow (a large model or dataset, a reward that takes its time): then start again "
                    f"with a larger limit, --collective_timeout_s {2 * self.timeout_s:g} for example.",
                    file=sys.stderr,
                    flush=True,
                )
                faulthandler.dump_traceback(all_threads=True)
                os._exit(HUNG)  # the main thread is inside a collective: no exception reaches it
