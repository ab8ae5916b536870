"""How much memory a measurement may take."""

from __future__ import annotations

import os

import torch


def free_bytes(device: torch.device) -> float:
    """Returns the memory that is free on a device, in bytes; 4e9 where it cannot be told."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + cached)
    try:
        with open("/proc/meminfo") as file:
            sizes = dict(line.split(":") for line in file)
        return float(sizes["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        pass  # not Linux
    try:
        return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
    except (AttributeError, ValueError, OSError):  # not a POSIX system either
        return 4e9


def most_bytes() -> float:
    """Returns the largest memory of any device here, used or free, in bytes; inf if unknown."""
    sizes = []
    if torch.cuda.is_available():
        devices = range(torch.cuda.device_count())
        sizes = [float(torch.cuda.get_device_properties(i).total_memory) for i in devices]
    try:
        sizes.append(float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")))
    except (AttributeError, ValueError, OSError):  # not a POSIX system
        return float("inf")
    return max(sizes)
