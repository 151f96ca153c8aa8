"""The pages of docs/: their Python runs, and what is generated is what would be generated now."""

import ast
import importlib.util
import re
import shlex
from pathlib import Path

import pytest

from mimo import cli
from mimo.config import MiMoConfig, SampleConfig, TrainConfig
from mimo.presets import TINY_SYSTEMS
from mimo_kernels.attention import FrameMask

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]])
def test_python_runs(page):
    """Block after block, with the names of those before."""
    names = {"FrameMask": FrameMask}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), names)


def maker(name: str):
    """A module of docs/ that writes a page."""
    spec = importlib.util.spec_from_file_location(name, DOCS / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_gallery_shows_the_masks_as_they_are():
    made = maker("make_gallery").page()
    for name, text in made.items():
        assert (DOCS / name).read_text() == text, f"{name}: python docs/make_gallery.py draws another one"
    assert {f"gallery/{path.name}" for path in (DOCS / "gallery").iterdir()} | {"gallery.md"} == set(made)


def test_the_results_are_those_of_the_benchmarks():
    assert (DOCS / "results.md").read_text() == maker("make_results").page(), "run: python docs/make_results.py"


def commands() -> list[str]:
    """Every command line of `mimo` in the shell blocks of README and docs, as the launchers start it."""
    found = []
    for path in [ROOT / "README.md", *DOCS.rglob("*.md")]:
        for block in re.findall(r"^```(?:ba)?sh\n(.*?)^```", path.read_text(), re.M | re.S):
            for line in block.replace("\\\n", " ").splitlines():
                for part in line.split(" && "):
                    part = re.sub(r"^torchrun .*-m mimo ", "mimo ", part)
                    part = re.sub(r"^sbatch .*examples/slurm.sh (.*)", r"mimo train \1 --resume", part)
                    found += [part] if part.startswith("mimo ") else []
    return sorted(set(found))


def test_every_command_is_one(monkeypatch):
    """The parser of the command line reads them; a run that is resumed is one of mimo-tiny."""
    told = {"preset": "mimo-tiny", "data": "shapes"}
    kinds = {"model": MiMoConfig, "train": TrainConfig, "sample": SampleConfig}
    configs = {name: kind.from_preset("mimo-tiny").to_dict() for name, kind in kinds.items()}
    monkeypatch.setattr("mimo.cli.train.remembered", lambda out: None if "xl" in out.name else configs | {"told": told})
    lines = commands()
    assert len(lines) > 30
    used = set()
    for line in lines:
        words = shlex.split(line, comments=True)[1:]
        command = cli.parse(words)
        assert getattr(command, "recipe", "mimo") in TINY_SYSTEMS, line
        used.add(type(command))
    assert used == set(cli.COMMANDS.values()), "a command without an example"


def test_readme_has_every_system_with_a_command():
    table = (ROOT / "README.md").read_text().partition("| system |")[2]
    shown = re.findall(r"\| `mimo demo(?: --recipe ([\w-]+))?` \|$", table, re.M)
    assert sorted(name or "mimo" for name in shown) == sorted(TINY_SYSTEMS)


def test_the_version_is_the_released_one():
    """In both packages, the changelog and the citation, with one date."""
    (newest, date) = re.search(
        r"^## ([\d.]+) \((\d{4}-\d\d-\d\d)\)$", (ROOT / "CHANGELOG.md").read_text(), re.M
    ).groups()
    cited = dict(re.findall(r"^(version|date-released): (\S+)$", (ROOT / "CITATION.cff").read_text(), re.M))
    assert cited == {"version": newest, "date-released": date}
    for package in ("mimo", "mimo_kernels"):
        module = ast.parse((ROOT / package / "__init__.py").read_text())
        values = {node.targets[0].id: node.value for node in module.body if isinstance(node, ast.Assign)}
        assert ast.literal_eval(values["__version__"]) == newest, package


def test_links_between_files_lead_somewhere():
    """Of README and changelog; those between pages are mkdocs' affair."""
    for name in ("README.md", "CHANGELOG.md"):
        for target in re.findall(r"\]\(([^)#]+)\)", (ROOT / name).read_text()):
            assert re.match("https?:", target) or (ROOT / target).exists(), f"{name}: {target}"


def test_every_page_is_in_the_table_of_contents():
    listed = set(re.findall(r"([\w/-]+\.md)$", (DOCS.parent / "mkdocs.yml").read_text(), re.M))
    assert listed == set(PAGES)


def test_the_table_of_support_has_every_gpu_and_no_loop_that_spills():
    """What is compiled anew in tests/aot has limits there; this is the page that people read."""
    page = (DOCS / "support.md").read_text()
    assert re.findall(r"^## (sm_\d+)", page, re.M) == ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"]
    limit, most = 0, []
    for line in page.splitlines():
        if found := re.match(r"(\d+) KiB of shared memory", line):
            limit = int(found[1])
        most += [(limit, int(size)) for size in re.findall(r"\| (\d+) KiB", line)]
    assert len(most) == 6 * 8 * 6 and all(size <= limit for limit, size in most)
    assert "in loops" not in page
