"""GPUs by the name their driver gives them: one table for MFU (nanomed.metrics) and for the planner (nanomed.plan)."""

import re
from dataclasses import dataclass

from nanomed import InputError


@dataclass(frozen=True)
class Gpu:
    """What one GPU promises."""

    bf16_flops: float  # dense tensor-core peak in FLOP/s, from the vendor's data sheet
    memory_mib: int  # all of it, as nvidia-smi counts: the "80 GB" of an H100 are 81,559 MiB, 85.5e9 bytes

    @property
    def memory_bytes(self) -> int:
        """The same in bytes."""
        return self.memory_mib << 20


GPUS = {  # a longer name before the shorter one that it contains
    "H100 PCIe": Gpu(756e12, 81559),
    "H100 NVL": Gpu(835e12, 95830),
    "H100": Gpu(989e12, 81559),
    "H200 NVL": Gpu(835e12, 143771),
    "H200": Gpu(989e12, 143771),
    "GH200": Gpu(989e12, 97871),
    "B200": Gpu(2250e12, 183359),
    "A100 40GB": Gpu(312e12, 40960),
    "A100": Gpu(312e12, 81920),
    "A800": Gpu(312e12, 81920),
    "L40S": Gpu(362e12, 46068),
    "A10G": Gpu(70e12, 23028),
    "RTX 4090": Gpu(165e12, 24564),
    "MI300X": Gpu(1307e12, 183105),  # the data sheet's 192 GB
}


def bf16_peak(driver_name: str) -> float | None:
    """Dense bf16 FLOP/s of the device a driver calls so ("NVIDIA H100 80GB HBM3"); None where that would be a guess."""
    if "Laptop" in driver_name or "MIG" in driver_name or driver_name.endswith(" D"):  # the last: smaller ones, for China
        return None
    return next((gpu.bf16_flops for name, gpu in GPUS.items() if re.search(rf"\b{name}\b", driver_name)), None)


def find(name: str) -> tuple[str, Gpu]:
    """(name, GPU) for a name from the command line, however spaced and capitalised: h100, a100-40gb, rtx4090."""
    wanted = re.sub(r"[^a-z0-9]", "", name.lower())
    for known, gpu in GPUS.items():
        if re.sub(r"[^a-z0-9]", "", known.lower()) == wanted:
            return known, gpu
    raise InputError(f"--gpu {name}: not in the table; there are {', '.join(GPUS)}")
