"""Writes results as Markdown and JSON, with the machine and the date."""

from __future__ import annotations

import json
import os
import platform
import time
from pathlib import Path
from typing import Any

RESULTS = os.fspath(Path(__file__).parent / "results")


def about_machine() -> dict[str, Any]:
    """Returns what figures depend on; `load` is how busy the machine was before the benchmark."""
    model = "unknown"
    for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
        if line.startswith("model name"):
            model = line.partition(":")[2].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()), "cpu": model, "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(memory / 2**30, 1), "kernel": platform.release(), "python": platform.python_version(),
        "load": round(os.getloadavg()[0], 2),
    }  # fmt: skip


def table(title: str, *rows: tuple[str, str, str]) -> list[str]:
    """Returns a Markdown table of (measure, figure, target); the target may be empty."""
    lines = [f"## {title}", "", "| measure | measured | target |", "|---|---|---|"]
    return [*lines, *(f"| {measure} | {figure} | {target or '–'} |" for measure, figure, target in rows), ""]


def write(directory: str, name: str, title: str, text: str, figures: Any, machine: dict[str, Any]) -> None:
    """Writes DIRECTORY/NAME.md and NAME.json, and prints the former."""
    os.makedirs(directory, exist_ok=True)
    about = (
        f"{machine['date']}, {machine['cpu']}, {machine['cores']} cores, {machine['memory_gib']} GiB, "
        f"Linux {machine['kernel']}, Python {machine['python']}; load average before: {machine['load']}"
    )
    page = f"# {title}\n\n{about}\n\n{text.strip()}\n"
    Path(directory, f"{name}.md").write_text(page, encoding="utf-8")
    data = json.dumps({"machine": machine, "figures": figures}, indent=1, ensure_ascii=False)
    Path(directory, f"{name}.json").write_text(data + "\n", encoding="utf-8")
    print(page, flush=True)
