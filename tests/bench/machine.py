"""The machine that a benchmark ran on, for its results."""

import platform
import re
from pathlib import Path


def cpu_name() -> str:
    """The processor as Linux names it; elsewhere as platform does."""
    info = Path("/proc/cpuinfo")
    found = re.search(r"model name\s*: (.*)", info.read_text()) if info.exists() else None
    return found[1] if found else platform.processor()
