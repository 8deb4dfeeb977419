"""Solving beside training (T5): a decision is extracted at one step and applied exactly `solve_lag` steps later.

Between the two, training goes on under the plan in force. What the solver reads is copied when it is extracted, so
the result depends on no timing: if the solver is late, the step it is due at waits for it. Repairs, which change
weights, are computed when the plan is applied, from the weights of then and the activations of the extraction.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

import torch

from topoprune.train.budget_recipe import BudgetRecipe
from topoprune.train.checkpoint import draft_of_state, draft_state
from topoprune.train.decision import Decision, Draft
from topoprune.train.distributed import gathered, own_rank, ranks
from topoprune.train.recipe import NeuroPruneRecipe

__all__ = ["PendingDecision", "run_jobs", "solved"]


def solved(draft: Draft, clock: Callable[[], float]) -> Draft:
    """Run the jobs of a draft on all ranks together; returns the draft with all solutions.

    Raises:
        RuntimeError: a job failed on another rank. What fails on this rank is raised as it is.
    """
    error: Exception | None = None
    try:
        run_jobs(draft, clock)
    except Exception as raised:
        if ranks() == 1:
            raise
        error = raised  # the other ranks wait for this one's share: they must hear of it
    return gathered(draft, error)


@torch.no_grad()
def run_jobs(draft: Draft, clock: Callable[[], float]) -> None:
    """Run this rank's share of the jobs of a draft, in order."""
    rank, world = own_rank(), ranks()
    for index, job in enumerate(draft.jobs):
        if draft.shared and index % world != rank:
            continue
        started = clock()
        draft.at_work = job.name
        found = job.run()
        if isinstance(found, Decision):
            draft.solutions |= dict(found.plan.solutions)
            draft.edge_axes |= dict(found.plan.edge_axes)
            parts: Mapping[str, float] = found.seconds
            for part, value in parts.items():
                draft.seconds[part] += value
        else:
            draft.solutions |= dict(found)
            draft.seconds["solve"] += clock() - started
    draft.jobs = ()


def check_schedule(recipe: Any, driver: Any, total_steps: int, steps_per_epoch: int) -> None:
    """Refuse decisions that cannot happen, before training.

    Raises:
        ValueError: a lag that reaches past the next decision or past the end of training; no epoch ends in training.
    """
    lag = getattr(recipe, "solve_lag", 0)
    if isinstance(recipe, NeuroPruneRecipe):
        if total_steps and steps_per_epoch > total_steps:
            raise ValueError(
                f"steps_per_epoch={steps_per_epoch} is more than total_steps={total_steps}: heads are decided after "
                "each epoch, and none would end; train longer or give a smaller steps_per_epoch"
            )
        if lag and not total_steps:
            raise ValueError(f"solve_lag={lag} needs total_steps=, the number of optimizer steps of the training")
        if lag > steps_per_epoch:
            raise ValueError(f"solve_lag={lag} reaches past the next decision, steps_per_epoch={steps_per_epoch} later")
    elif isinstance(recipe, BudgetRecipe):
        steps = driver.steps
        if len(steps) < recipe.solves:
            warnings.warn(
                f"only {len(steps)} of solves={recipe.solves} decisions fit into the steps {steps[0]} to {steps[-1]} "
                f"(ramp={recipe.ramp} of total_steps={total_steps}); the budget is met all the same",
                stacklevel=4,
            )
        nearest = min((after - before for before, after in pairwise(steps)), default=lag)
        if lag > nearest:
            raise ValueError(
                f"solve_lag={lag} reaches past the next decision: decisions are taken after steps {steps}; use at most "
                f"{nearest}, or fewer solves"
            )
        if steps[-1] + lag > total_steps:
            raise ValueError(
                f"the last decision, after step {steps[-1]}, would be applied after step {steps[-1] + lag} "
                f"(solve_lag={lag}), but training ends at total_steps={total_steps}; end the ramp earlier (it is "
                f"ramp={recipe.ramp}) or lower solve_lag"
            )


class PendingDecision:
    """A decision whose solver runs beside training.

    Args:
        draft: extracted whole (``beside=True``). due: step to apply it after. clock: for `Draft.seconds`.
    """

    def __init__(self, draft: Draft, due: int, clock: Callable[[], float]) -> None:
        self.draft, self.due = draft, due
        self._clock = clock
        self._error: BaseException | None = None
        self._gathered = False
        # A daemon: an exception in training must end the program, not wait for a solver.
        self._thread = threading.Thread(target=self._work, name=f"topoprune-solve-{draft.step}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        try:
            run_jobs(self.draft, self._clock)
        except BaseException as error:  # surfaces in the training thread
            self._error = error

    def result(self) -> Draft:
        """Return the solved draft; waits for the solver.

        Under torch.distributed all ranks must call this together.

        Raises:
            RuntimeError: the solver failed; names the site, has the cause.
        """
        self._thread.join()
        if self._gathered:
            return self.draft
        error: Exception | None = None
        if self._error is not None:
            error = RuntimeError(
                f"solving {self.draft.at_work!r} beside training failed (decided after step {self.draft.step}, due "
                f"after step {self.due}): {self._error}"
            )
            error.__cause__ = self._error
        self.draft = gathered(self.draft, error)
        self._gathered = True
        return self.draft

    def state_dict(self) -> dict[str, Any]:
        """Return the result; waits for the solver, so that a resumed run goes on with the same plan."""
        return {"due": self.due, "draft": draft_state(self.result())}

    @classmethod
    def from_state(cls, state: Mapping[str, Any], clock: Callable[[], float]) -> PendingDecision:
        """Rebuild a decision that was solved before the checkpoint was written."""
        pending = cls(draft_of_state(state["draft"]), int(state["due"]), clock)
        pending._gathered = True
        return pending
