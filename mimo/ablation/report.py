"""What an ablation found, written down: tables, verdicts and plots, from the files of its cells alone.

OUT/NAME/results.json, .csv, .md     a row per variant, seed and measured step
OUT/NAME/summary.json, .csv, .md     a row per variant at the last step: means over seeds, and the paper's figure
OUT/NAME/verdicts.json, .csv, .md    a row per claim, metric and budget
OUT/NAME/METRIC.png                  against steps and against floating-point operations
OUT/NAME/horizon.png                 PSNR of every predicted frame
"""

from __future__ import annotations

from mimo.ablation.plan import Plan
from mimo.ablation.plots import plot_horizon, plot_metric
from mimo.ablation.results import collect, judge, rows, summary, verdict_rows
from mimo.ablation.variants import Ablation
from mimo.evaluation.tables import write_tables


def write(
    plan: Plan,
    name: str,
    ablation: Ablation,
    variants: tuple[str, ...],
    seeds: list[int],
    level: float,
    *,
    plots: bool = True,
) -> str:
    """Everything that can be said of the cells that are there; returns the tables, or that there is nothing yet.

    plots: False leaves them as they are, which takes seconds less.
    """
    found = collect(plan, variants, seeds)
    if found is None:
        return "no seed is measured in every variant yet"
    out, about = plan.out / name, {"ablation": name, "title": ablation.title, **plan.record()}
    about |= {"seeds": found.seeds, "steps measured": found.steps, "level": level}
    n = f"{len(found.seeds)} seeds, {found.steps[-1]} steps"
    judged = judge(found, ablation.claims, level)
    write_tables(out, "results", rows(found, variants), about=about)
    summarised = summary(found, ablation, variants)
    shown = [c for c in dict.fromkeys(key for row in summarised for key in row) if not c.endswith((" sd", " layer"))]
    tables = [write_tables(out, "summary", summarised, about=about, shown=shown, notes=[f"{ablation.title}; {n}."])]
    if judged:
        columns = ["claim", "source", "by", "at", "verdict", "difference", "low", "high", "seeds", "clips"]
        tables.append(write_tables(out, "verdicts", verdict_rows(judged), about=about, shown=columns))
    for metric in found.metrics if plots else ():
        plot_metric(out / f"{metric.name.replace(' ', '_')}.png", found, variants, metric)
    if plots and found.horizon:
        plot_horizon(out / "horizon.png", found, variants)
    return "\n".join(next(path for path in paths if path.suffix == ".md").read_text() for paths in tables)
