"""The pages of docs/: their Python runs, and what is generated is what would be generated now."""

import importlib.util
import re
from pathlib import Path

import pytest

from mimo_kernels.attention import FrameMask

DOCS = Path(__file__).resolve().parent.parent / "docs"
PAGES = sorted(page.relative_to(DOCS).as_posix() for page in DOCS.rglob("*.md"))
BLOCKS = {page: re.findall(r"^```python\n(.*?)^```", (DOCS / page).read_text(), re.M | re.S) for page in PAGES}


@pytest.mark.parametrize("page", [page for page in PAGES if BLOCKS[page]])
def test_python_runs(page):
    """Block after block, with the names of those before."""
    names = {"FrameMask": FrameMask}
    for block in BLOCKS[page]:
        exec(compile(block, page, "exec"), names)


def test_the_gallery_shows_the_masks_as_they_are():
    path = DOCS / "make_gallery.py"
    spec = importlib.util.spec_from_file_location("make_gallery", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    made = module.page()
    for name, text in made.items():
        assert (DOCS / name).read_text() == text, f"{name}: python docs/make_gallery.py draws another one"
    assert {f"gallery/{path.name}" for path in (DOCS / "gallery").iterdir()} | {"gallery.md"} == set(made)


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
