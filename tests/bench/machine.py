"""The machine that a benchmark ran on, for its results, and one wait policy of OpenMP's threads for all sides."""

import os
import platform
import re
from pathlib import Path

# As nanomed sets it for our side; the peers' processes inherit it. Threads that spin slow down beside other work.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as platform does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
