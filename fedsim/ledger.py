"""F5. The privacy account of a run: which mechanisms ran on whose data and how often, and what that costs.

What is accounted is what ran: each client's own rounds, steps and sampling rate, of all phases together. The state is two tables of
counts, which a checkpoint keeps.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from fedsim.data import count_steps
from fedsim.engine import Received
from fedsim.errors import FedsimError, ScenarioError
from fedsim.fleet import Bernoulli, ConstantRate, Full, Steady, Uniform
from fedsim.pace import Sync
from fedsim.privacy import Protection, Spent, Unit, default_delta, epsilon, solve_noise, zcdp

if TYPE_CHECKING:
    from torch import Tensor

    from fedsim.scenario import Phase, Privacy, Scenario

MOST_KINDS = 500
"""Kinds of clients that are looked at one by one; of more, a client that is worst in everything stands for all."""


@dataclass(frozen=True)
class Ledger:
    """How the account is kept. Counts go in and come out.

    Attributes:
        stages: the phases, with their noise.
        privacy: delta, budget and accountant.
        sizes: training examples of each client, `[N]` int64.
        sampling: of clients in a round: one use of a client-level mechanism.
        units: whom the run protects; empty: nobody.
    """

    stages: tuple[Phase, ...]
    privacy: Privacy
    sizes: np.ndarray
    sampling: Spent | None
    units: tuple[Unit, ...]

    def start(self) -> dict[str, Tensor]:
        """Counts before the first round: rounds of each phase, and in how many of them each client took part."""
        if not self.units:
            return {}
        phases = len(self.stages)
        return {"rounds": torch.zeros(phases, dtype=torch.int64), "took": torch.zeros(phases, len(self.sizes), dtype=torch.int64)}

    def enter(self, counts: dict[str, Tensor], phase: int, received: Received) -> dict[str, Tensor]:
        """The counts after a round. Who was asked and lost, or rejected, has used its data as well."""
        if not counts:
            return counts
        rounds, took = counts["rounds"].clone(), counts["took"].clone()
        rounds[phase] += 1
        arrived = [] if received.arrivals is None else received.arrivals.ids.tolist()
        took[phase, sorted({*arrived, *received.lost, *received.rejected})] += 1
        return {"rounds": rounds, "took": took}

    def row(self, counts: dict[str, Tensor], phase: int) -> dict[str, float]:
        """What is to be logged of a round: epsilon, delta, rho and noise, or nothing."""
        out: dict[str, float] = {}
        for number, unit in enumerate(self.units):
            label = "privacy." if number == 0 else f"privacy.{unit}."
            if self._pretends(unit):
                label = "privacy.pretended."
            cost, rho = self._cost(counts, unit)
            out |= {f"{label}epsilon": cost, f"{label}delta": self.delta(unit) + self._skipped(counts, unit), f"{label}rho": rho}
            protection = _protection(self.stages[phase], unit)
            if protection is not None and protection.noise is not None:
                out[f"{label}noise"] = float(protection.noise)
        return out

    def exhausted(self, counts: dict[str, Tensor], phase: int) -> bool:
        """Whether another round of everybody could pass the budget."""
        budget = self.privacy.budget if self.privacy.budget is not None else self.privacy.target_epsilon
        if budget is None or not self.units or not self.stages[phase].strategy.asks:
            return False
        after = {name: table.clone() for name, table in counts.items()}
        after["rounds"][phase] += 1
        after["took"][phase] += torch.from_numpy(self.sizes > 0)
        return self._cost(after, self.units[0])[0] > budget

    def delta(self, unit: Unit) -> float:
        """Of the scenario, or by the number of records."""
        records = float(self.sizes.sum()) if unit == "example" else float(len(self.sizes))
        return self.privacy.delta if self.privacy.delta is not None else default_delta(records)

    def _skipped(self, counts: dict[str, Tensor], unit: Unit) -> float:
        """The chance that a client was alone in a round. A round in which nobody comes is skipped, which shows: delta grows by it."""
        if unit == "example" or self.sampling is None or self._pretends(unit):
            return 0.0
        q, others = self.sampling.rate, int((self.sizes > 0).sum()) - 1
        return float(counts["rounds"].sum()) * q * (1 - q) ** others if q < 1 else 0.0

    def _pretends(self, unit: Unit) -> bool:
        found = (_protection(stage, unit) for stage in self.stages)
        return any(p is not None and p.pretended is not None for p in found)

    def _cost(self, counts: dict[str, Tensor], unit: Unit) -> tuple[float, float]:
        """Epsilon and rho of the client that has spent most."""
        delta, accountant = self.delta(unit), self.privacy.accountant
        cost = rho = 0.0
        for spent in self._candidates(counts, unit):
            cost, rho = max(cost, epsilon(spent, delta, accountant)), max(rho, zcdp(spent))
        return cost, rho

    def _candidates(self, counts: dict[str, Tensor], unit: Unit) -> Iterator[list[Spent]]:
        """What the clients have spent that may have spent most."""
        rounds, took = counts["rounds"].numpy(), counts["took"].numpy()
        columns: list[np.ndarray] = []  # rate and uses, phase after phase, [N] each
        protections: list[Protection | None] = []
        for stage, count, times in zip(self.stages, rounds, took, strict=True):
            protection = _protection(stage, unit)
            protections.append(protection)
            rate, uses = np.ones(len(times)), times
            if protection is not None and protection.unit == "example":
                program = stage.strategy.local
                rate = np.asarray(program.chances(self.sizes), dtype=np.float64)
                uses = times * count_steps(program, self.sizes) * len(program.passes)
            elif protection is not None and self._one_round(protection) is not None:
                uses = np.full(len(times), count)  # sampling is part of the mechanism, so rounds count, and not who came
            columns += [np.where(uses > 0, rate, 0.0), uses.astype(np.float64)]
        for row in _most(np.stack(columns, axis=1)):
            yield [self._spent(protections[p], row[2 * p], int(row[2 * p + 1])) for p in range(len(protections))]

    def _one_round(self, protection: Protection) -> Spent | None:
        """One use of a client-level mechanism whose sampling amplifies it."""
        if protection.pretended is not None:
            cohort, population = protection.pretended
            return Spent(0.0, cohort / population, 1)
        return self.sampling

    def _spent(self, protection: Protection | None, rate: float, uses: int) -> Spent:
        if protection is None:
            return Spent(0.0, 1.0, uses)  # whoever took part has been used without protection
        noise = math.nan if protection.noise is None else float(protection.noise)  # NaN: still open
        once = self._one_round(protection) if protection.unit == "client" else None
        return Spent(noise, rate, uses) if once is None else replace(once, noise=noise, uses=uses)


def open_ledger(scenario: Scenario, sizes: np.ndarray) -> Ledger:
    """The account of a scenario, its noise solved for where `privacy.target_epsilon` says so. Warns of a delta that promises nothing."""
    stages = scenario.stages()
    found = {p.unit for stage in stages for p in (stage.strategy.protects(), stage.strategy.local.protects()) if p is not None}
    units: tuple[Unit, ...] = tuple(unit for unit in ("client", "example") if unit in found)
    # Where a phase trains on clients without protection, what it costs is infinite, and is said.
    whole = tuple(unit for unit in units if all(_protection(stage, unit) or not stage.strategy.asks for stage in stages))
    ledger = Ledger(stages, scenario.privacy, sizes, client_sampling(scenario, sizes), whole or units)
    for unit in ledger.units:
        records = int(sizes.sum()) if unit == "example" else len(sizes)
        if ledger.delta(unit) >= 1 / records:
            warnings.warn(
                f"privacy.delta {ledger.delta(unit):g} is at least 1/n (n = {records} {unit}s): a mechanism that publishes one of them "
                f"in the clear would satisfy it; take less than {1 / records:g}",
                UserWarning,
                stacklevel=2,
            )
    return _solve(ledger, scenario)


def refuse_unknown_sizes(scenario: Scenario) -> None:
    """Raise where the account depends on how many examples clients have, and one brings others than the scenario's."""
    programs = [stage.strategy.local for stage in scenario.stages() if stage.strategy.local.protects() is not None]
    if not programs:
        return
    if scenario.privacy.target_epsilon is not None or scenario.privacy.delta is None:
        open_ = "delta" if scenario.privacy.delta is None else "target_epsilon"
        fix = "set it" if open_ == "delta" else "give the `noise` itself, and a budget"
        raise ScenarioError(f"privacy.{open_}", f"follows from the scenario's own examples, and a node brings others; {fix}")
    sizes = np.array([1, 1000, 1_000_000])
    for program in programs:
        rates, steps = program.chances(sizes), count_steps(program, sizes)
        if rates is None or np.ptp(rates) or np.ptp(steps):
            name = program.registered_name
            raise ScenarioError("strategy.local", f"what {name} costs a node depends on how many examples it has; give `rate` and `steps`")


def client_sampling(scenario: Scenario, sizes: np.ndarray) -> Spent | None:
    """How a round samples clients, as one use of a mechanism, where that is known to amplify privacy; else None: take part is counted."""
    participation, pace = scenario.fleet.participation, scenario.pace
    if any(stage.participation is not None for stage in scenario.stages()):
        return None  # phases differ in whom they ask
    cohort = pace.cohort if isinstance(pace, Sync) else None
    there = int((sizes > 0).sum())
    if isinstance(participation, Full):
        return Spent(0.0, 1.0, 1, (cohort, there) if cohort is not None and cohort < there else None)
    if cohort is None and isinstance(participation, Uniform):
        return Spent(0.0, 1.0, 1, (participation.clients, len(sizes)) if participation.clients < len(sizes) else None)
    if cohort is None and isinstance(participation, Bernoulli):
        rates, modulation = participation.rates, participation.modulation
        if isinstance(rates, ConstantRate) and isinstance(modulation, Steady):
            return Spent(0.0, rates.mean, 1)
    return None


def _protection(stage: Phase, unit: Unit) -> Protection | None:
    """What protects a unit in a phase. What protects a whole client protects each of its examples, too."""
    of_client, of_example = stage.strategy.protects(), stage.strategy.local.protects()
    return of_client if unit == "client" else of_example or of_client


def _most(rows: np.ndarray) -> np.ndarray:
    """The rows that no other row exceeds in every column: epsilon grows with each column. `[N, D] -> [K, D]`."""
    kinds = np.unique(rows, axis=0)
    if len(kinds) > MOST_KINDS:
        return kinds.max(0, keepdims=True)
    at_least, more = kinds[None] >= kinds[:, None], kinds[None] > kinds[:, None]  # [K, K, D]
    return kinds[~np.any(np.all(at_least, axis=2) & np.any(more, axis=2), axis=1)]


def _solve(ledger: Ledger, scenario: Scenario) -> Ledger:
    """The ledger with the noise that `target_epsilon` asks for, in each phase that leaves it open."""
    target = ledger.privacy.target_epsilon
    if target is None:
        return ledger
    if len(ledger.units) > 1:
        raise ScenarioError("privacy.target_epsilon", "solves for one `noise`, but clients and examples have one each; give both")
    counts = ledger.start()
    for i, stage in enumerate(ledger.stages):
        if not stage.strategy.asks:
            continue
        counts["rounds"][i] = stage.rounds
        counts["took"][i] = torch.from_numpy(np.where(ledger.sizes > 0, _most_rounds(scenario, stage.rounds, ledger), 0))
    unit = ledger.units[0]
    delta = ledger.delta(unit)
    try:
        noise = max(solve_noise(target, delta, spent, ledger.privacy.accountant) for spent in ledger._candidates(counts, unit))
    except FedsimError as error:
        raise ScenarioError("privacy.target_epsilon", f"{error}; a larger delta, fewer steps or smaller batches need less") from None
    return replace(ledger, stages=tuple(_with_noise(stage, noise) for stage in ledger.stages))


def _most_rounds(scenario: Scenario, rounds: int, ledger: Ledger) -> int:
    """In how many rounds a client takes part at most: all where everybody does, else what none of N exceeds with a chance of 99 %."""
    sampling = ledger.sampling
    rate = 1.0 if sampling is None else sampling.of[0] / sampling.of[1] if sampling.of else sampling.rate
    if rate >= 1:
        return rounds
    from scipy.stats import binom

    return min(rounds, math.ceil(binom.ppf(1 - 0.01 / len(ledger.sizes), rounds, rate)))


def _with_noise(stage: Phase, noise: float) -> Phase:
    """The phase with its open `noise` set."""
    strategy: Any = stage.strategy
    if (p := strategy.protects()) is not None and p.noise is None:
        strategy = replace(strategy, noise=noise)
    if (p := strategy.local.protects()) is not None and p.noise is None:
        strategy = _with_local_noise(strategy, noise)
    return replace(stage, strategy=strategy)


def _with_local_noise(strategy: Any, noise: float) -> Any:
    if hasattr(strategy, "inner"):
        return replace(strategy, inner=_with_local_noise(strategy.inner, noise))
    return replace(strategy, local=replace(strategy.local, noise=noise))
