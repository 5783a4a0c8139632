"Waiting in tests: until something has happened, as long as it still can."

import subprocess
import time
from collections.abc import Callable

PATIENCE = 900  # seconds; only a failing test waits so long, whatever the machine and whatever else runs on it


def wait_until(happened: Callable[[], bool], what: str, alive: subprocess.Popen | None = None) -> None:
    "Wait for something, as long as the process that should bring it about is alive."
    deadline = time.monotonic() + PATIENCE
    while not happened():
        assert alive is None or alive.poll() is None, f"ended before {what}: {alive.communicate()[0]}"
        assert time.monotonic() < deadline, f"waited {PATIENCE} s in vain for {what}"
        time.sleep(0.02)
