"""F1. How often each client takes part, learned from the rounds between: FedAU's online estimate, for any strategy that wants it.

Wang and Ji, "A Lightweight Method for Tackling Unknown Participation Statistics in Federated Averaging", ICLR 2024 (arXiv 2306.03401),
Algorithm 2. In every round, for every client n, after the round's update used omega_n:

    s_n <- s_n + 1
    if n took part, or s_n = K:   omega_n <- mean of omega_n's M_n intervals and s_n;  M_n <- M_n + 1;  s_n <- 0

omega_n is 1 until an interval is complete. Under participation with probability p, E omega_n = (1 - (1-p)^K) / p, which is 1/p without a
cutoff K.

The intervals that are complete cover all rounds but the last s_n, so their sum is (rounds so far) - s_n, and a client that stays away
completes one of length K every K rounds. So nothing has to be done for the absent, nor in a round in which nobody takes part: two whole
numbers a client, written when it takes part, say everything.
"""

from __future__ import annotations

from typing import Annotated

import torch
from annotated_types import Gt
from torch import Tensor

from fedsim.problem import Problem
from fedsim.strategy import Report
from fedsim.tree import record
from fedsim.types import Arrivals

Cutoff = Annotated[int, Gt(0)] | None
"""K, the length at which an interval is cut; None = never."""


@record
class Intervals:
    """What is known of the clients' participation. Rounds are counted from 0: `t` rounds are over before round `t`.

    Attributes:
        since: rounds that were over after each client last took part (0: never), `[N]` int32.
        count: M_n, its intervals complete by then, `[N]` int32.
    """

    since: Tensor
    count: Tensor

    @staticmethod
    def none(clients: int, device: torch.device | str = "cpu") -> Intervals:
        """Before round 0."""
        zeros = torch.zeros(clients, dtype=torch.int32, device=device)
        return Intervals(zeros, zeros)

    def complete(self, t: int, cutoff: Cutoff, ids: Tensor | slice = slice(None)) -> tuple[Tensor, Tensor]:
        """Sum and number M of the intervals that are complete when `t` rounds are over. `[C], [C]` int32."""
        since, count = self.since[ids], self.count[ids]
        if cutoff is None:
            return since, count
        cut = (t - since).div(cutoff, rounding_mode="trunc")  # times that s reached K since then
        return since + cut * cutoff, count + cut

    def omega(self, t: int, cutoff: Cutoff, ids: Tensor | slice = slice(None)) -> Tensor:
        """The estimates of 1/p that are in force in round `t`, `[C]` float32."""
        total, count = self.complete(t, cutoff, ids)
        return torch.where(count > 0, total / count, 1.0)

    def after(self, t: int, cutoff: Cutoff, ids: Tensor) -> Intervals:
        """What is known after the clients `ids` took part in round `t`."""
        _, count = self.complete(t, cutoff, ids)
        return Intervals(self.since.index_fill(0, ids, t + 1), self.count.index_copy(0, ids, count + 1))


def judge(intervals: Intervals, cutoff: Cutoff, problem: Problem, arrivals: Arrivals) -> Report:
    """The estimates in force, beside the true 1/p where it is known. Bias and relative error are means over all clients that ever come.

    omega_bias = mean of omega - 1/p;  omega_error = mean of |omega p - 1|;  truth = 1/p of each arrival, `[C]`.
    """
    if problem.rates is None:
        return {}
    p, omega = problem.rates, intervals.omega(int(problem.version), cutoff)
    if not bool((p > 0).all()):
        come = p > 0
        p, omega = p[come], omega[come]
    excess = omega * p - 1
    return {
        "truth": 1 / problem.rates[arrivals.ids],
        "omega_bias": float((excess / p).mean()),
        "omega_error": float(excess.abs().mean()),
    }
