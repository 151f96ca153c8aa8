"""What .ci/run reads from the project's own files: `facts.py commands | oldest | extra NAME`, one item a line.

commands: the shell commands of README's section "Try it". oldest: torch, triton and numpy at the lower bounds of
pyproject.toml. extra NAME: the requirements of an extra.
"""

import re
import sys
from pathlib import Path

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

PROJECT = tomllib.loads(Path("pyproject.toml").read_text())["project"]


def commands() -> list[str]:
    section = re.search(r"^## Try it\n(.*?)^## ", Path("README.md").read_text(), re.M | re.S)[1]
    return [line for block in re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S) for line in block.splitlines()]


def oldest() -> list[str]:
    bounds = re.compile(r"(torch|triton|numpy)>=([\d.]+)")
    found = [match for requirement in PROJECT["dependencies"] if (match := bounds.match(requirement))]
    assert len(found) == 3, f"expected a lower bound for torch, triton and numpy in {PROJECT['dependencies']}"
    return [f"{match[1]}=={match[2]}" for match in found]


def extra(name: str) -> list[str]:
    return PROJECT["optional-dependencies"][name]


if __name__ == "__main__":
    verb, *given = sys.argv[1:]
    print("\n".join({"commands": commands, "oldest": oldest, "extra": extra}[verb](*given)))
