"""The oldest release of each dependency that pyproject.toml allows, as constraints for pip: `make test-lowest`."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

PROJECT = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
EXTRAS = {name: asked for name, asked in PROJECT["optional-dependencies"].items() if name != "bench"}
"""But for other simulators, which only benchmarks look at."""
ASKED = [*PROJECT["dependencies"], *(each for extra in EXTRAS.values() for each in extra)]


def lowest(requirement: str) -> str:
    """`flwr[simulation]>=1.41,<1.42` is `flwr==1.41`; one without a lower bound is a mistake."""
    found = re.fullmatch(r"([\w-]+)(\[\w+\])?>=([\d.]+)(,<[\d.]+)?", requirement)
    if found is None:
        raise SystemExit(f"no lower bound: {requirement}")
    return f"{found[1]}=={found[3]}"


if __name__ == "__main__":
    print("\n".join(sorted({lowest(each) for each in ASKED})))
