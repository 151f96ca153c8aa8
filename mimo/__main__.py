"""`python -m mimo` and the console script `mimo`: the command line, or what to install for it."""

import sys
from importlib.util import find_spec

PACKAGES = {  # of the extra `mimo`: module and distribution
    "av": "av",
    "einops": "einops",
    "huggingface_hub": "huggingface_hub",
    "matplotlib": "matplotlib",
    "PIL": "pillow",
    "safetensors": "safetensors",
    "tensorboard": "tensorboard",
    "torchmetrics": "torchmetrics",
    "tqdm": "tqdm",
    "tyro": "tyro",
}


def main() -> int:
    """Run one command, see mimo.cli; returns the exit status. What is missing is said before anything runs, and not at
    the end of a training."""
    missing = [package for module, package in PACKAGES.items() if find_spec(module) is None]
    if missing:
        print(f"error: mimo needs {', '.join(missing)}: pip install 'mimo-kernels[mimo]'", file=sys.stderr)
        return 2
    from mimo.cli import main as command_line

    return command_line()


if __name__ == "__main__":
    sys.exit(main())
