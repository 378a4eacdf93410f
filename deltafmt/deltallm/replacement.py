"""Progressive module replacement: while a student trains, its delta modules stand in for the originals by chance.

The idea is that of BERT-of-Theseus (Xu et al., arXiv 2002.02925), as DeltaLLM uses it (arXiv 2501.18596): each delta
learns among neighbours that still work. Its probability rises on a schedule, that of later blocks first, as these are
the more redundant ones.
"""

from __future__ import annotations

import random
from collections.abc import Mapping

from torch import nn

from ..torch.fused import deltas
from .structure import Plan

_SPREAD = 0.5
"""Of the time until all are replaced: how much later the first block begins to rise than the last one."""


class Replacement:
    """The delta modules of a student, and what stands in their places at the moment.

    Modules are replaced together that have the same parent: all of one MLP, or all of one attention. There is no
    wrapper: `draw` puts either module into the model, and a teacher's module, which is used as it is, stays the
    teacher's. So no weight is held twice, and a step costs what its modules cost.

    Args:
        teacher: the original model; None if nothing is to be replaced step by step.
        student: the same with delta modules, all of them in their places. They stay there if `until` is 0.
        plan: names the delta modules.
        begin: probability of a delta module before it rises.
        until: fraction of the training from which on all deltas are in place, 0 to 1.
        seed: of the draws, which depend on it and on the step alone.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        plan: Plan | None,
        *,
        begin: float = 0.25,
        until: float = 0.5,
        seed: int = 0,
    ) -> None:
        self._student, self._begin, self._until, self._seed = student, begin, until, seed
        self._groups: list[tuple[nn.Module, Mapping[str, nn.Module], Mapping[str, nn.Module]]] = []
        if teacher is None or plan is None or until <= 0:
            return
        named = deltas(student)
        parents = dict.fromkeys(name.rpartition(".")[0] for name in plan.anchors if name in named)
        for parent in parents:
            leaves = [name.rpartition(".")[2] for name in plan.anchors if name.rpartition(".")[0] == parent]
            ours, theirs = student.get_submodule(parent), teacher.get_submodule(parent)
            self._groups.append(
                (
                    ours,
                    {leaf: ours.get_submodule(leaf) for leaf in leaves},
                    {leaf: theirs.get_submodule(leaf) for leaf in leaves},
                )
            )
        self._trainable = [
            place
            for place, (_, modules, _) in enumerate(self._groups)
            if any(each.requires_grad and each.numel() for module in modules.values() for each in module.parameters())
        ]

    def probability(self, group: int, progress: float) -> float:
        """That the delta modules of a group (in the order of the model) are in place, at a fraction of the training."""
        if progress >= self._until:
            return 1.0
        last = len(self._groups) - 1
        delay = _SPREAD * (last - group) / last if last else 0.0
        rise = (progress / self._until - delay) / (1 - _SPREAD)
        return self._begin + (1 - self._begin) * min(1.0, max(0.0, rise))

    def draw(self, step: int, steps: int) -> float:
        """Put the modules of a step in place. At least one group with factors has them, so that something trains.

        Returns:
            The fraction of groups that have their deltas.
        """
        if not self._groups:
            return 1.0
        chance = random.Random(f"{self._seed} {step}")
        active = [chance.random() < self.probability(group, step / steps) for group in range(len(self._groups))]
        if self._trainable and not any(active[group] for group in self._trainable):
            active[chance.choice(self._trainable)] = True
        for (parent, ours, theirs), replaced in zip(self._groups, active, strict=True):
            for leaf, module in (ours if replaced else theirs).items():
                parent._modules[leaf] = module
        return sum(active) / len(active)

    def finish(self) -> None:
        """Put every delta module in its place."""
        for parent, ours, _ in self._groups:
            parent._modules.update(ours)
