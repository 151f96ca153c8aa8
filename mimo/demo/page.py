"""What `mimo demo` shows: a video, a GIF, a contact sheet, the losses, and one page with all of them."""

import base64
from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

import numpy as np

from mimo.data import contact_sheet, write_gif, write_video
from mimo.data.writing import upscale
from mimo.folders import atomic_path

ORANGE, GREY = (235, 120, 20), (200, 200, 200)
ERROR_GAIN = 2  # an error map is so much brighter than the difference of the pictures

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222; }}
img {{ max-width: 100%; }}
table {{ border-collapse: collapse; margin: 1rem 0; }}
td, th {{ border-bottom: 1px solid #ccc; padding: .2rem .8rem; text-align: right; }}
td:first-child, th:first-child {{ text-align: left; }}
pre {{ background: #f4f4f4; padding: .8rem; overflow-x: auto; }}
</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""


def write_pictures(out: Path, truth: np.ndarray | None, made: np.ndarray, context: int) -> list[Path]:
    """The video, the GIF and the contact sheet of some clips uint8 [B, F, H, W, 3]; truth=None: they predict nothing,
    and stand alone."""
    grid, rows = _row(made, context), {}
    if truth is not None:
        grid = np.concatenate([_row(truth, context), grid], axis=1)
    for number in range(len(made)):
        if truth is None:
            rows[f"sample {number + 1}"] = made[number]
            continue
        rows[f"clip {number + 1}: truth"] = truth[number]
        rows[f"clip {number + 1}: prediction"] = made[number]
        rows[f"clip {number + 1}: error x {ERROR_GAIN}"] = error_map(made[number], truth[number])
    return [
        write_video(out / "prediction.mp4", grid, fps=5),
        write_gif(out / "prediction.gif", grid, fps=5),
        contact_sheet(out / "contact_sheet.png", rows, context),
    ]


def error_map(made: np.ndarray, truth: np.ndarray) -> np.ndarray:
    """The mean difference of the colours of every pixel times ERROR_GAIN, black is none: uint8 [F, H, W, 3] of two such
    clips."""
    error = ERROR_GAIN * np.abs(made.astype(np.float32) - truth).mean(-1, keepdims=True)
    return error.clip(0, 255).round().astype(np.uint8).repeat(3, axis=-1)


def _row(clips: np.ndarray, context: int) -> np.ndarray:
    """Clips side by side with a border that is orange while context is shown: [B, F, H, W, 3] -> [F, H', W', 3]."""
    framed = []
    for clip in clips:
        big = upscale(clip, 128)
        border = np.empty((len(big), big.shape[1] + 8, big.shape[2] + 8, 3), np.uint8)
        border[:context], border[context:] = ORANGE, GREY
        border[:, 4:-4, 4:-4] = big
        framed.append(border)
    return np.concatenate(framed, axis=2)


def plot_losses(path: Path, records: Sequence[Mapping[str, float]], names: Mapping[str, str]) -> Path:
    """names: of the losses, and what they are called."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.5), layout="constrained")
    axes = figure.subplots()
    steps = [record["step"] for record in records]
    for name, label in names.items():
        axes.plot(steps, [record[name] for record in records], label=label)
    axes.set(xlabel="step", ylabel="loss", yscale="log")
    axes.grid(alpha=0.3, which="both")
    axes.legend()
    with atomic_path(path) as temporary:
        figure.savefig(temporary, dpi=120)
    return path


def write_page(
    path: Path,
    *,
    title: str,
    told: Sequence[str],
    frames: Mapping[str, Sequence[float]],
    first_frame: int,
    pictures: Mapping[str, Path],
    commands: Sequence[str],
) -> Path:
    """One HTML file that needs no other.

    Args:
        told: paragraphs: what was trained, how long, how good it is.
        frames: rows of a table of PSNR in dB, a number per predicted frame; the first of them is `first_frame`.
        pictures: PNG and GIF files by what is said above them.
        commands: what to try next.
    """
    body = [f"<p>{escape(paragraph)}</p>" for paragraph in told]
    if frames:
        count = len(next(iter(frames.values())))
        head = "".join(f"<th>frame {first_frame + i}</th>" for i in range(count))
        rows = (
            f"<tr><td>{escape(name)}</td>" + "".join(f"<td>{value:.2f}</td>" for value in values) + "</tr>"
            for name, values in frames.items()
        )
        body += ["<h2>PSNR in dB</h2>", f"<table><tr><th></th>{head}</tr>", *rows, "</table>"]
    for name, picture in pictures.items():
        kind = picture.suffix.removeprefix(".")
        data = base64.b64encode(picture.read_bytes()).decode()
        body += [f"<h2>{escape(name)}</h2>", f'<img alt="{escape(name)}" src="data:image/{kind};base64,{data}">']
    body += ["<h2>Where to go next</h2>", f"<pre>{escape(chr(10).join(commands))}</pre>"]
    with atomic_path(path) as temporary:
        temporary.write_text(_PAGE.format(title=escape(title), body="\n".join(body)), encoding="utf-8")
    return path
