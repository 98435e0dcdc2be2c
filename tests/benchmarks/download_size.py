"""How many bytes set-up downloads from PyPI, by what the index says of the wheels in the lock.

    python tests/benchmarks/download_size.py INDEX [PYTHON_TAG]

INDEX is the URL of a simple package index that answers in JSON, as PyPI's does; the tag is cp312 unless given. Prints
three sums in GB: torch as PyPI has it, the CUDA libraries that this build needs, everything else.
"""

from __future__ import annotations

import json
import re
import sys
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from speculators.runner import environment

ACCEPT = {"Accept": "application/vnd.pypi.simple.v1+json"}


def canonical(text: str) -> str:
    """Names as they are written in the names of wheels."""
    return re.sub(r"[-_.]+", "_", text).lower()


def wheel_bytes(index: str, name: str, version: str, tag: str) -> int:
    """Size of the wheel that Linux on x86-64 takes; 0 where there is only a source archive."""
    request = urllib.request.Request(f"{index}/{name}/", headers=ACCEPT)
    with urllib.request.urlopen(request, timeout=60) as answer:
        files = json.load(answer)["files"]
    fits = re.compile(rf"(py3|py2\.py3|{tag}|py312)-none-any|({tag}-{tag}|abi3|none)-manylinux\S*x86_64")
    start = canonical(f"{name}-{version}-")
    wheels = [file for file in files if canonical(file["filename"]).startswith(start)]
    return next((file["size"] for file in wheels if fits.search(file["filename"])), 0)


def main(index: str, tag: str = "cp312") -> None:
    """Ask for every package of the lock."""
    lock = environment.read_lock(Path(environment.LOCK))
    lines = [line.partition(" ; ") for line in lock.requirements]
    pins = dict(pin.split("==") for pin, _, marker in lines if "== 's390x'" not in marker or " or " in marker)
    with ThreadPoolExecutor(16) as pool:
        sizes = dict(zip(pins, pool.map(lambda pin: wheel_bytes(index, *pin, tag), pins.items()), strict=True))
    libraries = sum(size for name, size in sizes.items() if environment.CUDA_LIBRARY.match(name))
    rest = sum(sizes.values()) - libraries - sizes["torch"]
    parts = {"torch": sizes["torch"], "CUDA libraries": libraries, "everything else": rest}
    print(", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items()))
    print(f"without a wheel: {', '.join(name for name, size in sizes.items() if not size) or 'none'}")


if __name__ == "__main__":
    main(*sys.argv[1:3])
