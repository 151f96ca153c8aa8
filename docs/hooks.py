"""mkdocs: the pictures of benchmarks/results are part of the site; docs/results.md, read in the repository, finds them
where they are."""

from pathlib import Path

from mkdocs.structure.files import File

RESULTS = Path(__file__).resolve().parent.parent / "benchmarks" / "results"


def on_files(files, config):
    for path in sorted(RESULTS.glob("*/*.png")):
        name = f"results/{path.relative_to(RESULTS).as_posix()}"
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown, page, **_):
    return markdown.replace("](../benchmarks/results/", "](results/") if page.file.src_uri == "results.md" else markdown
