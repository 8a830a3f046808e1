"""Facts that every result carries: the device, its clocks, the versions, the commit."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
from pathlib import Path

import torch

import onepass
from onepass.core import cpu_library

CPUFREQ = Path("/sys/devices/system/cpu/cpu0/cpufreq")
PEERS = ("triton", "liger-kernel", "quack-kernels", "flash-attn-4")  # whose versions a result on a GPU carries
# What nvidia-smi is asked, and the names under which a result holds it.
GPU_QUERY = {
    "driver_version": "driver",
    "clocks.sm": "sm_mhz",
    "clocks.max.sm": "max_sm_mhz",
    "clocks.mem": "memory_mhz",
    "clocks.max.mem": "max_memory_mhz",
    "power.draw": "watts",
    "power.limit": "max_watts",
    "temperature.gpu": "celsius",
}


def _first_line(path: Path) -> str:
    return path.read_text().splitlines()[0].strip() if path.is_file() else ""


def _cpuinfo() -> dict[str, str]:
    """The first processor's entry in /proc/cpuinfo; empty where there is none."""
    path = Path("/proc/cpuinfo")
    entry = path.read_text().split("\n\n")[0] if path.is_file() else ""
    pairs = (line.split(":", 1) for line in entry.splitlines() if ":" in line)
    return {key.strip(): value.strip() for key, value in pairs}


def cpu_model() -> str:
    """The processor's name as the system tells it, e.g. "AMD EPYC 9654 96-Core Processor"."""
    info = _cpuinfo()
    return info.get("model name") or info.get("CPU part") or platform.processor() or platform.machine()


def device_slug(device: str = "cpu") -> str:
    """A folder name for results of this kind of device: the GPU's name, or processor, cores and widest ISA, e.g.
    "nvidia-h200" or "amd-epyc-9654-2-cores-avx512-bf16".
    """
    if device == "cuda":
        return re.sub(r"[^a-z0-9]+", "-", torch.cuda.get_device_name().lower()).strip("-")
    info = _cpuinfo()
    # Cloud machines often hide the model's number; family and model of the processor tell the generation.
    numbers = f"family {info['cpu family']} model {info['model']}" if {"cpu family", "model"} <= info.keys() else ""
    text = f"{cpu_model()} {numbers} {core_count()} cores {cpu_library.isas()[-1]}"
    text = re.sub(r"\((r|tm)\)|\bprocessor\b|\bcpu\b|@.*?ghz", " ", text.lower())
    return re.sub(r"[^a-z0-9]+", "-", text).strip("-")


def core_count() -> int:
    """Processors this process may use."""
    return len(os.sched_getaffinity(0))


def clocks() -> dict[str, float | str]:
    """Clock facts where the system shows them: current and highest MHz, and the governor."""
    found: dict[str, float | str] = {}
    if "cpu MHz" in (info := _cpuinfo()):
        found["cpuinfo_mhz"] = float(info["cpu MHz"])
    for name in ("scaling_cur_freq", "cpuinfo_max_freq"):
        if text := _first_line(CPUFREQ / name):
            found[f"{name.removesuffix('_freq')}_mhz"] = int(text) / 1000.0
    if governor := _first_line(CPUFREQ / "scaling_governor"):
        found["governor"] = governor
    return found


def gpu_clocks() -> dict[str, float | str]:
    """What nvidia-smi tells of the current GPU now: driver, clocks in MHz, power, temperature; empty without it."""
    if torch.version.hip is not None:
        return {}
    index = torch.cuda.current_device()
    uuid = getattr(torch.cuda.get_device_properties(index), "uuid", "")
    for number in (f"GPU-{uuid}", str(index)):  # the number alone is right where no GPU is hidden
        query = ["nvidia-smi", f"--id={number}", f"--query-gpu={','.join(GPU_QUERY)}", "--format=csv,noheader,nounits"]
        try:
            done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        except (OSError, subprocess.TimeoutExpired):
            return {}
        if done.returncode == 0:
            return parse_gpu_clocks(done.stdout)
    return {}


def parse_gpu_clocks(line: str) -> dict[str, float | str]:
    """One line of nvidia-smi's CSV, by our names; numbers where they are numbers."""
    found: dict[str, float | str] = {}
    for name, text in zip(GPU_QUERY.values(), line.strip().split(", "), strict=False):
        try:
            found[name] = text if name == "driver" else float(text)
        except ValueError:  # "[N/A]"
            found[name] = text
    return found


def _git(folder: Path, *args: str) -> str:
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, timeout=10, check=False
        )
    except FileNotFoundError:  # git is not installed
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def commit() -> str:
    """The commit of the source checkout that is the working directory, "-dirty" when files differ; empty elsewhere."""
    here = Path.cwd()
    if not (here / "src" / "onepass").is_dir():
        return ""
    name = _git(here, "rev-parse", "HEAD")
    changed = _git(here, "status", "--porcelain", "--untracked-files=no", "--", ":!benchmarks")  # results may change
    return f"{name}-dirty" if name and changed else name


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def facts(num_threads: int, device: str = "cpu") -> dict[str, object]:
    """Everything a reader needs to judge a figure measured now on "cpu" or "cuda"."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "device": device_slug(device),
        "cpu": cpu_model(),
        "cores": core_count(),
        "threads": num_threads,
        **(_gpu_facts() if device == "cuda" else _cpu_facts()),
        "load_average": float(_first_line(Path("/proc/loadavg")).split(" ")[0] or "nan"),
        "system": f"{platform.system()} {'.'.join(platform.release().split('.')[:2])} {platform.machine()}",
        "python": platform.python_version(),
        "torch": torch.__version__,
        "onepass": onepass.__version__,
        "commit": commit(),
    }


def _cpu_facts() -> dict[str, object]:
    return {
        "isa": cpu_library.isa(),
        "isas": list(cpu_library.isas()),
        "clocks": clocks(),
        "torch_cpu_capability": torch.backends.cpu.get_cpu_capability(),
    }


def _gpu_facts() -> dict[str, object]:
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "capability": f"{properties.major}.{properties.minor}",
        "cuda": torch.version.cuda or torch.version.hip,
        "clocks": gpu_clocks(),
        "versions": {package: version for package in PEERS if (version := _version(package))},
    }
