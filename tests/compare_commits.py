"""Whether two commits compute the same, bit for bit: python tests/compare_commits.py OLD [NEW] [--presets NAME ...]

Every preset that both know is built small (its own fields, fewer and narrower blocks, smaller frames), filled with
fixed random weights, and run on the CPU in one process per commit: the names of its parameters and what they are
initialised with, the losses of some steps, every gradient, and samples without and with guidance. What is compared is
SHA-256 checksums of the bytes. NEW is the working tree where it is left out. A commit is given the compiled extension
of this tree; --old-extension names another one for OLD, where its functions were others. Exit status 1 if anything
differs.
"""

import argparse
import dataclasses
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STEPS = (0, 1, 5)
VARIANTS = {  # of a preset: what no preset has
    "separate_ln=False": ("mimo-b-k600", {"separate_ln": False}),
    "l=depth": ("mimo-b-minecraft", {"mask_offsets": (2, 0, 1), "decoder_layer": 3, "mask_region": "all"}),
    "interleaved": ("mimo-tiny", {"interleaved": True}),
    "learned positions": ("mimo-xl-ucf101", {"positions": "learned"}),
    "intervals": ("mimo-b-k600", {"max_interval": 5}),
    "nothing masked": ("mimo-b-minecraft", {"mask_weight": 0.0, "mask_ratio": (0.0, 0.0)}),
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("old")
    parser.add_argument("new", nargs="?")
    parser.add_argument("--presets", nargs="*", default=[])
    parser.add_argument("--old-extension", type=Path, help="the _C*.so that OLD was built with")
    options = parser.parse_args()
    ours = next((ROOT / "mimo_kernels").glob("_C*.so"))
    old = results(options.old, options.presets, options.old_extension or ours)
    new = results(options.new, options.presets, ours)
    parts = list(dict.fromkeys(part for found in old.values() for part in found))
    print(f"{'preset':<40}" + "".join(f"{part:<16}" for part in parts))
    differs = False
    for preset in [name for name in old if name in new]:
        same = [old[preset][part] == new[preset].get(part) for part in parts]
        differs |= not all(same)
        print(f"{preset:<40}" + "".join(f"{'equal' if equal else 'DIFFERS':<16}" for equal in same))
    for side, here, there in (("OLD", old, new), ("NEW", new, old)):
        if only := [name for name in here if name not in there]:
            print(f"only in {side}: {', '.join(only)}")
    return int(differs)


def results(commit: str | None, presets: list[str], extension: Path) -> dict[str, dict[str, str]]:
    """Checksums per preset and part, computed by the code of a commit."""
    if commit is None:
        return run_worker(ROOT, presets)
    with tempfile.TemporaryDirectory() as folder:
        tree = Path(folder) / "tree"
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--quiet", "--detach", str(tree), commit], check=True)
        try:
            shutil.copy(extension, tree / "mimo_kernels")
            return run_worker(tree, presets)
        finally:
            subprocess.run([*git, "remove", "--force", str(tree)], check=True)


def run_worker(tree: Path, presets: list[str]) -> dict[str, dict[str, str]]:
    environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    code = f"import runpy; runpy.run_path({str(Path(__file__).resolve())!r}, run_name='worker')"
    command = [sys.executable, "-P", "-c", code, *presets]
    done = subprocess.run(command, env=environment, cwd=tree, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


# The worker: everything below runs in the tree of one commit ----------------------------------------------------------


def worker(presets: list[str]) -> dict[str, dict[str, str]]:
    import torch

    import mimo
    from mimo.config import PRESETS

    if Path(mimo.__file__).parents[1] != Path.cwd():
        raise RuntimeError(f"{mimo.__file__} was imported: expected the package in {Path.cwd()}")
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    found = {name: checksums(name, {}) for name in presets or PRESETS if name in PRESETS}
    if not presets:
        found |= {f"{name}, {what}": checksums(name, changes) for what, (name, changes) in VARIANTS.items()}
    return found


def small(name: str, changes: dict):
    """The preset's network, its own in everything but size and changes."""
    from mimo.config import MiMoConfig

    config = MiMoConfig.from_preset(name)
    size = {
        "depth": 3,
        "dim": 2 * config.head_dim,
        "heads": 2,
        "height": 4,
        "width": 4,
        "frames": min(config.frames, 5),
    }
    layer = 3 if config.decoder_layer == config.depth else 2
    if getattr(config, "coarse_stride", 0):
        size |= {"coarse_stride": 2, "fine_frames": 3}
    size |= {"decoder_layer": layer, "decoder_depth": min(config.decoder_depth, 1)}
    if getattr(config, "repa_weight", 0) > 0:  # there are commits that do not know it
        size |= {"repa_layer": 2, "repa_channels": 16, "repa_hidden": 16}
    return dataclasses.replace(config, **size | changes)


def checksums(name: str, changes: dict) -> dict[str, str]:
    import torch

    from mimo import MiMo

    config = small(name, changes)
    torch.manual_seed(0)
    model = MiMo(config)
    found = {"parameters": checksum(dict(model.named_parameters()))}
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    found |= training(model, config)
    return found | {"samples": sampling(model, name, guided=False), "guided": sampling(model, name, guided=True)}


def training(model, config) -> dict[str, str]:
    import torch

    recipe, step_generator = objective(config)
    latents = torch.randn(2, *config.latent_shape, generator=torch.Generator().manual_seed(1))
    given = conditions(config, 2, config.frames)
    if getattr(config, "repa_weight", 0) > 0:
        given["features"] = torch.randn(2, 8, 3, 3, 16, generator=torch.Generator().manual_seed(2))
    losses, gradients = {}, {}
    for step in STEPS:
        model.zero_grad()
        loss = recipe.loss(model, latents, generator=step_generator(0, step, "cpu"), step=step, **given)
        loss.total.backward()
        losses |= {f"{step}/{part}": value for part, value in loss._asdict().items() if value is not None}
        gradients |= {f"{step}/{name}": p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"losses": checksum(losses), "gradients": checksum(gradients)}


def sampling(model, name: str, *, guided: bool) -> str:
    import torch

    from mimo.config import SampleConfig
    from mimo.sampling.sampler import Sampler

    config, generator = model.config, torch.Generator().manual_seed(2)
    preset = SampleConfig.from_preset(name)
    some = {"history_guidance": 1.5 if config.history_dropout else 1.0, "class_guidance": 2.0}
    none = {"history_guidance": 1.0, "class_guidance": 1.0}
    length = min(preset.context_frames, 1)
    changes = {"steps": 3, "context_frames": length, "num_frames": config.frames} | (some if guided else none)
    sampler = Sampler(model.eval(), dataclasses.replace(preset, **changes))
    context = torch.randn(2, 1, config.tokens, config.channels, generator=generator) if length else None
    given = conditions(config, 2, config.frames) | ({} if length else {"batch": 2})
    with torch.no_grad():
        return checksum({"video": sampler.sample(context, config.frames, generator=generator, **given)})


def conditions(config, clips: int, frames: int) -> dict:
    import torch

    generator = torch.Generator().manual_seed(3)
    draw = {
        "labels": (config.num_classes, (clips,)),
        "actions": (config.num_actions, (clips, frames)),
    }
    given = {name: torch.randint(n, shape, generator=generator) for name, (n, shape) in draw.items() if n}
    if config.max_interval:
        given["intervals"] = 1 + torch.randint(config.max_interval, (clips,), generator=generator)
    return given


def objective(config):
    """The recipe of a config and the generator of a step, under the names that this commit has for them."""
    try:
        from mimo.recipes import build_recipe
        from mimo.recipes.base import step_generator
    except ImportError:
        from mimo.recipes import Recipe as build_recipe
        from mimo.recipes import step_generator
    return build_recipe(config), step_generator


def checksum(tensors: dict) -> str:
    """Of names, shapes and bytes, in the order given."""
    digest = hashlib.sha256()
    for name, tensor in tensors.items():
        tensor = tensor.detach().contiguous()
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


if __name__ == "worker":
    print(json.dumps(worker(sys.argv[1:])))
elif __name__ == "__main__":
    sys.exit(main())
