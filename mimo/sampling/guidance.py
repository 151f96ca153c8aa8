"""Guidance: the branches whose velocities are summed, the histories they see, and what the network is told in each.

    v = sum over branches of weight * v(branch),   weights add up to 1

A step runs all branches as one batch. They differ in what the network is told (labels and actions, or the null ones)
and in the history that their frame sees: none, or one of H histories. History 0 is told the conditions. There is a
second one, told nothing, where a branch that is told nothing sees history and a condition changes a history frame's
keys and values (`HistoryPolicy.conditions` of the recipe): a history is what the branch would have seen in training,
whole.

Letters: B clips, K trajectories per clip, S = B * K sequences, G branches, H histories.
"""

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mimo.config import MiMoConfig
from mimo.network.cross import Text
from mimo.recipes.base import HistoryPolicy


@dataclass(frozen=True)
class Branch:
    """A summand of the guided velocity.

    Args:
        weight: its factor.
        history: number of the history that it sees; None: it sees none.
        condition: it is told labels and actions; False: the null ones.
    """

    weight: float
    history: int | None = 0
    condition: bool = True


def guidance_branches(history_guidance: float, class_guidance: float, *, own_history: bool = False) -> list[Branch]:
    """v = v(h, c) + (w_h - 1) (v(h, c) - v(-, c)) + (w_c - 1) (v(h, c) - v(h', -)); summands of weight 0 are left out.

    h' is h, or with `own_history` one that is told nothing either, in any of its frames (FAR's protocol, which MiMo's
    Table 12 follows). With one kind of guidance this is ``(1 - w) v(null) + w v`` (MiMo, Eq. 27).

    The branches that are the first to see a history come first, in its order: so the rows of a frame that becomes
    history in all of them are the first rows of a step.
    """
    blind = Branch(1 - history_guidance, history=None)
    null = Branch(1 - class_guidance, history=int(own_history), condition=False)
    others = [branch for branch in ((null, blind) if own_history else (blind, null)) if branch.weight]
    return [Branch(1 - sum(branch.weight for branch in others)), *others]


class RunKey(NamedTuple):
    """What the buffers of a run depend on. labels, actions: whether they are given. context_frames: of the longest."""

    clips: int
    trajectories: int
    context_frames: int
    num_frames: int
    labels: bool
    actions: bool
    dtype: torch.dtype
    branches: tuple[Branch, ...]
    pace: float | None = None  # times of training per frame, where positions are interpolated
    text: int = 0  # tokens of a text, padded; 0: none is given

    @property
    def asked(self) -> list[int | bool]:
        """What the caller of the run decides; the sampler says the rest."""
        asked = [self.clips, self.trajectories, self.context_frames, self.num_frames, self.labels, self.actions]
        return [*asked, self.text] if self.text else asked

    @property
    def sequences(self) -> int:
        return self.clips * self.trajectories

    @property
    def histories(self) -> int:
        return 1 + max(branch.history or 0 for branch in self.branches)


class Conditions:
    """What the network is told, one row per sequence, in memory whose addresses never change.

    Args:
        history: how a finished frame becomes history, the policy of the recipe.
    """

    def __init__(self, config: MiMoConfig, key: RunKey, history: HistoryPolicy, device: torch.device):
        self.position = torch.zeros(key.sequences, dtype=torch.int64, device=device)  # of the frame being made
        self.labels = torch.zeros_like(self.position) if key.labels else None
        self.actions = self.position.new_zeros(key.sequences, key.num_frames) if key.actions else None
        self.intervals = torch.ones_like(self.position) if config.max_interval else None
        self.text = torch.zeros(key.sequences, key.text, config.text_dim, device=device) if key.text else None
        # Levels of noise of the frames: 0, but for those that `tell_noise` tells of.
        self.noise = self.position.new_zeros(key.sequences, key.num_frames) if config.noise_levels else None
        self._levels = config.noise_levels, config.max_noise
        self.history, self._histories, self._pace = history, key.histories, key.pace
        self._null = {"labels": config.num_classes, "actions": config.num_actions}
        told = [branch.condition for branch in key.branches]
        self._told = torch.tensor(told, device=device)[:, None]  # [G, 1]; the first to see a history come first

    def time(self, frame: Any) -> Any:
        """Where a frame, or int64 ones, stand in time for the network: between its times where they are
        interpolated."""
        return frame if self._pace is None else frame * self._pace

    @property
    def tensors(self) -> dict[str, Tensor]:
        """The buffers by name, without `position`."""
        given = {"labels": self.labels, "actions": self.actions, "intervals": self.intervals, "text": self.text}
        return {name: static for name, static in given.items() if static is not None}

    def take(self, given: dict[str, Tensor], positions: list[int]) -> None:
        """The conditions of a run, one row per sequence, and the frame that each sequence makes first."""
        for name, static in self.tensors.items():
            static.copy_(given[name])
        self.position.copy_(torch.tensor(positions))
        if self.noise is not None:
            self.noise.zero_()

    def tell_noise(self, deviation: float) -> None:
        """So much noise is added to the frames being made when they become history."""
        if self.noise is not None:
            levels, most = self._levels
            level = round(deviation / most * (levels - 1))
            self.noise.scatter_(1, self.position[:, None], level)

    def of_branches(self) -> dict[str, Any]:
        """labels and actions of the rows of a step, int64 [G * S] each, and their texts, as far as they are given."""
        now, names = self._now(), ("labels", "actions", "text")
        return {name: self._or_null(name, now[name], self._told) for name in names if name in now}

    def of_histories(self, rows: Tensor | None = None, frames: Tensor | None = None) -> dict[str, Any]:
        """What R frames are told as history, in every history: the timestep, and conditions, int64 [H * R] each.

        rows, frames: int64 [R], the frames' sequences and times; default: the frames being made.
        """
        given = self._now() if rows is None or frames is None else self._at(rows, frames)
        told = self._told[: self._histories]
        found: dict[str, Any] = {"timestep": self.history.timestep, "kind": self.history.kind}
        if self.noise is not None:
            now = rows is None or frames is None
            noise = self.noise.gather(1, self.position[:, None])[:, 0] if now else self.noise[rows, frames]
            found["noise"] = noise.expand(self._histories, -1).flatten()
        found |= {name: self._or_null(name, given[name], told) for name in given if name in self.history.conditions}
        if "intervals" in given:
            found["intervals"] = given["intervals"].expand(self._histories, -1).flatten()
        return found

    def _now(self) -> dict[str, Tensor]:
        """Of the frames being made, [S] each."""
        now = self.tensors
        if "actions" in now and self.actions is not None:
            now["actions"] = self.actions.gather(1, self.position[:, None])[:, 0]
        return now

    def _at(self, rows: Tensor, frames: Tensor) -> dict[str, Tensor]:
        return {name: x[rows, frames] if name == "actions" else x[rows] for name, x in self.tensors.items()}

    def _or_null(self, name: str, given: Tensor, told: Tensor) -> Tensor | Text:
        if name == "text":
            return Text.padded(torch.where(told[..., None, None], given, 0.0).flatten(0, 1))
        return torch.where(told, given, self._null[name]).flatten()
