"""What an ablation found, and a verdict per claim, from the files of its cells alone.

A claim about generation is judged by PSNR and by the Frechet distance, one about representations by every factor's
probe, at its best layer (the one with the most right answers over all seeds and clips of that variant, so each variant
has its own); one about cost by the count. "At equal steps" is the last step. "At equal compute" is the number of
operations that the cheaper of the two has used by then, where the dearer one is interpolated between its measurements;
its learning rate has not come down there, which the schedule of a shorter run would have done.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np

from mimo import records
from mimo.ablation.plan import Cell, Plan
from mimo.ablation.variants import VARIANTS, Ablation, Claim
from mimo.ablation.verdict import Verdict, verdict
from mimo.costs import gflop_until


@dataclass(frozen=True)
class Metric:
    """sign: +1 where more is better. judge: of which claims. unit: of the axis."""

    name: str
    unit: str
    sign: int
    judge: str


@dataclass
class Found:
    """What was measured: of (variant, metric) an array [seeds, steps, clips], and the floating-point operations of a
    variant at those steps, in GFLOP. horizon: of a variant the PSNR of every frame made at the last step, [seeds,
    frames]. layers: the layer that stands for (variant, factor)."""

    seeds: list[int]
    steps: list[int]
    values: dict[tuple[str, str], np.ndarray]
    gflop: dict[str, np.ndarray]
    horizon: dict[str, np.ndarray]
    layers: dict[tuple[str, str], str]

    @property
    def metrics(self) -> list[Metric]:
        found = dict.fromkeys(name for _, name in self.values)
        return [metric(name) for name in found]


def metric(name: str) -> Metric:
    if name == "psnr":
        return Metric(name, "PSNR of predicted frames, dB", 1, "generation")
    if name == "frechet":
        return Metric(name, "Frechet distance of DCT features", -1, "generation")
    return Metric(name, f"linear probe of history: {name.removeprefix('probe ')}, share right", 1, "representation")


def collect(plan: Plan, variants: tuple[str, ...], seeds: list[int]) -> Found | None:
    """The cells of those seeds that every variant is measured of, at all steps; None if there is no such seed."""

    def read(variant: str, seed: int) -> list[dict[str, Any]]:
        cell = Cell(variant, seed)
        return [records.read(cell.measured(plan.out, step), dict) for step in plan.steps]

    whole = [
        seed
        for seed in seeds
        if all(Cell(v, seed).measured(plan.out, step).exists() for v in variants for step in plan.steps)
    ]
    if not whole:
        return None
    found = Found(whole, plan.steps, {}, {}, {}, {})
    for variant in variants:
        measured = [read(variant, seed) for seed in whole]  # [seeds][steps]
        model, train = plan.configs(Cell(variant, whole[0]))
        found.gflop[variant] = np.array([gflop_until(model, train, step) for step in plan.steps])
        found.values[variant, "frechet"] = _array(measured, lambda record: [record["frechet"]])
        if "psnr" in measured[0][0]:
            by_frame = _array(measured, lambda record: record["psnr"])  # [seeds, steps, clips, frames]
            found.values[variant, "psnr"] = by_frame.mean(-1)
            found.horizon[variant] = by_frame[:, -1].mean(1)
        for factor in measured[0][0].get("probe", {}):
            layers = list(measured[0][0]["probe"][factor])
            right = {layer: _array(measured, lambda record: record["probe"][factor][layer]) for layer in layers}  # noqa: B023
            best = max(layers, key=lambda layer: right[layer][:, -1].mean())  # noqa: B023
            found.layers[variant, factor] = best
            found.values[variant, f"probe {factor}"] = right[best]
    return found


def _array(measured: list[list[dict[str, Any]]], of: Callable[[dict[str, Any]], Any]) -> np.ndarray:
    return np.array([[of(record) for record in steps] for steps in measured], dtype=np.float64)


@dataclass(frozen=True)
class Judged:
    claim: Claim
    metric: str
    at: str
    verdict: Verdict | None  # None: it was counted, not measured
    holds: bool
    says: str


def judge(found: Found, claims: Iterable[Claim], level: float) -> list[Judged]:
    """Every claim of which both variants were measured, by every metric of its kind, at equal steps and compute."""
    judged = []
    for claim in claims:
        if not {claim.better, claim.worse} <= found.gflop.keys():
            continue
        if claim.by == "cost":
            costs = [found.gflop[name][-1] for name in (claim.better, claim.worse)]
            holds, ratio = bool(costs[0] < costs[1]), costs[0] / costs[1]
            says = f"{'holds' if holds else 'does not'}: {ratio:.4g} of its operations, counted"
            judged.append(Judged(claim, "operations", "a step", None, holds, says))
            continue
        for each in (m for m in found.metrics if m.judge == claim.by):
            for at, differences in _differences(found, claim, each.name):
                outcome = verdict(each.sign * differences, level=level)
                judged.append(Judged(claim, each.name, at, outcome, outcome.outcome == "holds", str(outcome)))
    return judged


def _differences(found: Found, claim: Claim, name: str) -> list[tuple[str, np.ndarray]]:
    """`better` minus `worse`, [seeds, clips]; at equal compute only where the two do not cost the same."""
    better, worse = (found.values[variant, name] for variant in (claim.better, claim.worse))
    costs = [found.gflop[variant] for variant in (claim.better, claim.worse)]
    differences = [("equal steps", better[:, -1] - worse[:, -1])]
    budget = min(cost[-1] for cost in costs)
    if costs[0][-1] != costs[1][-1] and all(cost[0] <= budget for cost in costs):
        at_budget = [_at(values, cost, budget) for values, cost in zip((better, worse), costs)]
        differences.append(("equal compute", at_budget[0] - at_budget[1]))
    return differences


def _at(values: np.ndarray, gflop: np.ndarray, budget: float) -> np.ndarray:
    """[seeds, steps, clips] where `budget` is used up, linearly between measurements: [seeds, clips]."""
    after = int(np.searchsorted(gflop, budget))
    if gflop[after] == budget:
        return values[:, after]
    share = (budget - gflop[after - 1]) / (gflop[after] - gflop[after - 1])
    return (1 - share) * values[:, after - 1] + share * values[:, after]


def rows(found: Found, variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """One per variant, seed and step."""
    made = []
    for variant in variants:
        for s, seed in enumerate(found.seeds):
            for t, step in enumerate(found.steps):
                row = {"variant": variant, "seed": seed, "step": step, "GFLOP": float(found.gflop[variant][t])}
                row |= {m.name: float(found.values[variant, m.name][s, t].mean()) for m in found.metrics}
                made.append(row)
    return made


def summary(found: Found, ablation: Ablation, variants: tuple[str, ...]) -> list[dict[str, Any]]:
    """One per variant: means over seeds and clips at the last step, and their standard deviation over seeds."""
    made = []
    for variant in variants:
        row: dict[str, Any] = {"variant": VARIANTS[variant].label, "seeds": len(found.seeds)}
        row["GFLOP"] = float(found.gflop[variant][-1])
        for each in found.metrics:
            by_seed = found.values[variant, each.name][:, -1].mean(1)
            row[each.name] = float(by_seed.mean())
            if len(by_seed) > 1:
                row[f"{each.name} sd"] = float(by_seed.std(ddof=1))
            factor = each.name.removeprefix("probe ")
            if (variant, factor) in found.layers:
                row[f"{each.name} layer"] = int(found.layers[variant, factor])
        if variant in ablation.paper:
            row[f"paper: {ablation.paper_metric}"] = ablation.paper[variant]
        made.append(row)
    return made


def verdict_rows(judged: list[Judged]) -> list[dict[str, Any]]:
    made = []
    for each in judged:
        v, labels = each.verdict, (VARIANTS[each.claim.better].label, VARIANTS[each.claim.worse].label)
        row: dict[str, Any] = {
            "claim": f"{labels[0]} better than {labels[1]}",
            "source": each.claim.source,
            "by": each.metric,
        }
        row |= {"at": each.at, "verdict": v.outcome if v else ("holds" if each.holds else "does not")}
        if v is not None:
            interval = {} if np.isinf(v.low) else {"low": v.low, "high": v.high}
            row |= {"difference": v.mean, **interval, "level": v.level, "seeds": v.seeds, "clips": v.clips}
            row |= {"seeds for it": v.seeds_for}
        made.append(row | {"in words": each.says})
    return made
