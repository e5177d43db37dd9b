"""Unlimited staleness: a stale update is turned into a fresh one by way of data that would give it (gradient inversion).

Wang and Gao, "Tackling Intertwined Data and Device Heterogeneities in Federated Learning with Unlimited Staleness", AAAI 2025
(arXiv 2309.13536).

    client i:  Delta_i = local(w_{t-tau}) - w_{t-tau}                                     an ordinary client: it knows of nothing
    server, for each stale Delta_i that is unlike the fresh ones:
        D_i     = argmin over (x, y) of || local(w_{t-tau}; x, y) - w_{t-tau} - Delta_i ||        over the `keep` largest entries
        hat_i   = local(w_t; D_i) - w_t
        Delta_i <- gamma hat_i + (1 - gamma) Delta_i;    staleness <- 0
    then `inner` has the updates.

    unlike:    its cosine distance to the nearest fresh update is above a quantile (`unique`) of the fresh ones' own nearest distances
    gamma:     1 until the switch at version s, then 1 - (t - s) / window, at least 0; s is `until` at the latest
    switch:    at the first t at which  E2 < margin * E1,  for the clients that arrive at t and whose D_i the server has from before:
               E1 = sum || local(v_i; D_i) - v_i - Delta_i ||_1,   E2 = sum || Delta_i^old - Delta_i ||_1,   v_i what i began with

Differs: the paper compares at time t with the true update of that time, which its code computes on the spot and its text awaits for tau
rounds. A server has it only if the client is asked at t. So ours compares when an update arrives: what it began with, v_i, dates from when
the client was asked, its change is the true update of *that* time, and D_i and Delta_i^old are what the server held of the client then. It
needs nothing that a deployment has not, costs one replay, and is made for fresh arrivals, too. The switch is for all clients, and for good.
Of the paper's text and not of its code: `keep`, `warm`, `unique`, the blend. Found nowhere, so ours: the quantile, the form of gamma, its
window. The released code's faults (`fixed.py`) are not repeated: (a) the fallback test is true before the switch and overwrites the result;
(b) after the switch a model trained from w_{t-tau} is averaged as if from w_t; (c) it switches on E1 < E2; (d) raw logits are targets of a
binary cross-entropy (here: cross-entropy against softmax(y)); (e) the true update has no delay. The best guess is kept, not the last;
a search ends early at `tolerance`; one that meets a NaN, or explains nothing, leaves its update as it is. Mini-batch steps are replayed as
steps on all of D_i. The paper's 40,000 iterations are beyond most; of 400, those by the l2 norm lead further than its l1 (`norm: l1`), so
that is the default. What an input can be is the range of the training inputs, for pictures of each channel: a server knows it from how its
clients prepare their data (`Problem.inputs`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor

from fedsim.inversion import Guess, Norm, Search, blank, distance, draw, invert, replay, sent_by
from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key, fold, fold_each
from fedsim.strategy import Count, Report, Strategy
from fedsim.table import Table
from fedsim.tree import finite, put, record, rows, tree_map
from fedsim.types import Arrivals, Updates
from fedsim.wrapper import Wrapper, asked, refuse_messages

_SEARCH = 0x5EA2C4  # folded into the server's key, beside whatever small numbers the inner strategy folds


@record
class Kept:
    """What the server keeps of a client whose update it inverted: the data that it found, and the update."""

    guess: Guess
    change: Params


@record
class Unstaling:
    """The inner strategy's state, and what stands around it.

    Attributes:
        inner: the inner state.
        kept: of each client, [N].
        switched: the version at which comparison spoke for direct use, or -1.
        seen: the last round's arrivals as `inner` saw them.
        told: what is to be said of the last round.
    """

    inner: Any
    kept: Table
    switched: int
    seen: Arrivals
    told: dict[str, float]

    @property
    def w(self) -> Params:
        w: Params = self.inner.w
        return w


@register("unstale")
@dataclass(frozen=True)
class Unstale(Wrapper):
    """Turn stale updates into fresh ones by gradient inversion before an inner strategy has them (Wang and Gao, AAAI 2025).

    fresh: staleness up to which an update is let through. unique: the quantile above; null = every stale update is inverted.
    examples: size of D_i. iterations, lr, norm, tolerance: of the search, which ends where the relative mismatch is down to `tolerance`.
    keep: share of the entries of Delta_i that are matched, the largest. warm: begin at the client's last D_i.
    margin, window, until: of the switch and of gamma, in rounds; until: null = no limit.
    """

    recalls: ClassVar[bool] = True

    inner: Strategy
    fresh: Annotated[int, Ge(0)] = 0
    unique: Annotated[float, Ge(0), Le(1)] | None = 0.5
    examples: Count = 32
    iterations: Count = 400
    lr: Annotated[float, Gt(0)] = 0.2
    norm: Norm = "l2"
    tolerance: Annotated[float, Ge(0)] = 0.05
    keep: Annotated[float, Gt(0), Le(1)] = 1.0
    warm: bool = True
    margin: Annotated[float, Ge(0)] = 0.9
    window: Annotated[int, Ge(0)] = 20
    until: Annotated[int, Ge(0)] | None = 300

    def __post_init__(self) -> None:
        refuse_messages(self.inner)
        if len(self.local.passes) > 1:
            raise ValueError(f"inner: {type(self.local).__name__} passes over its data in more than one way, and cannot be replayed")

    def inside(self, state: Unstaling) -> Any:
        return state.inner

    def init(self, problem: Problem, w: Params) -> Unstaling:
        problem.task.targets(torch.zeros(1, problem.task.outputs))  # a task that has none says so before anybody trains
        kept = Table.of(Kept(blank(problem, w, self.examples), w.zeros()), problem.clients, problem.storage)
        nobody = torch.zeros(0, dtype=torch.int64)
        return Unstaling(self.inner.init(problem, w), kept, -1, Arrivals(nobody, torch.zeros(0), nobody, nobody), {})

    def server(self, problem: Problem, state: Unstaling, updates: Updates, key: Key) -> Unstaling:
        now, told = int(problem.version), dict[str, float]()
        if self.gamma(now, state.switched) > 0:
            e1, e2 = self.compare(problem, state, updates, key)
            if state.switched < 0 and e2 < self.margin * e1:
                state = replace(state, switched=now)
            told |= {"estimate_error": e1, "direct_error": e2}
        told["gamma"] = gamma = self.gamma(now, state.switched)
        where = self.unlike(updates).nonzero()[:, 0] if gamma > 0 else updates.arrivals.ids[:0]  # [U]
        told["inverted"] = float(len(where))
        if len(where):
            updates, kept, effort = self.renew(problem, state, updates, where, gamma, key)
            state, told = replace(state, kept=kept), told | effort
        inner = self.inner.server(problem, state.inner, updates, key)
        return Unstaling(inner, state.kept, state.switched, updates.arrivals, told)

    def gamma(self, now: int, switched: int) -> float:
        """How much of an estimate is used at version `now`."""
        ends = [version for version in (switched, self.until) if version is not None and version >= 0]
        if not ends or now < min(ends):
            return 1.0
        return max(0.0, 1 - (now - min(ends)) / self.window) if self.window else 0.0

    def unlike(self, updates: Updates) -> Tensor:
        """Which updates are stale and unlike the fresh ones. `[C]` bool. Two fresh ones at least are needed to say what is like."""
        stale = updates.arrivals.staleness > self.fresh
        fresh = ~stale
        if self.unique is None or fresh.sum() < 2 or not bool(stale.any()):
            return stale
        change = updates.payload.flat()
        change = change.to(torch.promote_types(change.dtype, torch.float32))
        unit = change / change.norm(dim=1, keepdim=True).clamp(min=torch.finfo(change.dtype).tiny)
        apart = 1 - unit @ unit[fresh].T  # [C, F]
        usual = apart[fresh].fill_diagonal_(torch.inf).amin(1).quantile(self.unique)  # nobody is a neighbour of itself
        return stale & (apart.amin(1) > usual).to(stale.device)

    def compare(self, problem: Problem, state: Unstaling, updates: Updates, key: Key) -> tuple[float, float]:
        """E1 and E2 over the arrivals that the server keeps something of: 0 where there are none."""
        known = torch.from_numpy(state.kept.written)[updates.arrivals.ids]
        if not bool(known.any()):
            return 0.0, 0.0
        back = updates.take(known)
        kept: Kept = state.kept.get(back.arrivals.ids)
        program, _ = asked(self.inner, problem, state.inner, back.arrivals.ids, key)
        sent = sent_by(program, back.started, back.arrivals.version, back.arrivals.n, back.payload)
        estimate = replay(problem, program, sent, kept.guess)
        return float(distance(estimate, back.payload).sum()), float(distance(kept.change, back.payload).sum())

    def renew(
        self, problem: Problem, state: Unstaling, updates: Updates, where: Tensor, gamma: float, key: Key
    ) -> tuple[Updates, Table, dict[str, float]]:
        """The updates with the rows `where` `[U]` made fresh as far as gamma says, what is kept from now on, and what it took."""
        stale, now = updates.take(where), problem.version.to(torch.int64)
        ids, n = stale.arrivals.ids, stale.arrivals.n
        program, message = asked(self.inner, problem, state.inner, ids, key)
        sent = sent_by(program, stale.started, stale.arrivals.version, n, stale.payload)
        search = Search(self.iterations, self.lr, self.tolerance, self.keep, self.norm)
        found = invert(problem, program, search, sent, self.first(problem, state, ids, key))
        estimate = replay(problem, program, replace(sent, started=message, version=now.expand(len(ids))), found.guess)
        sound = (finite(estimate) & (found.lowest < 1)).cpu()  # else it explains nothing of the update
        effort = {"failed": float((~sound).sum()), "iterations": float(found.iterations.double().mean())}
        effort["mismatch"] = float(found.lowest.cpu()[sound].mean()) if bool(sound.any()) else math.inf
        where, estimate, message, old = where[sound], rows(estimate, sound), rows(message, sound), rows(stale.payload, sound)
        last = sound & torch.cat([ids[1:] != ids[:-1], torch.ones_like(sound[:1])])  # of a client that arrived twice
        kept = state.kept.put(ids[last], Kept(rows(found.guess, last), rows(stale.payload, last)))
        arrivals = updates.arrivals
        arrivals = replace(
            arrivals, staleness=arrivals.staleness.index_fill(0, where, 0), version=arrivals.version.index_fill(0, where, int(now))
        )
        payload = put(updates.payload, where, gamma * estimate + (1 - gamma) * old)
        started = put(updates.started, where, message) if self.inner.recalls else updates.started
        return replace(updates, arrivals=arrivals, payload=payload, started=started), kept, effort

    def first(self, problem: Problem, state: Unstaling, ids: Tensor, key: Key) -> Guess:
        """Where each search begins: at random, or at what the last one found."""
        guess = draw(problem, state.w, self.examples, fold_each(fold(key, _SEARCH), ids.numpy()))
        known = torch.from_numpy(state.kept.written)[ids].to(guess.x.device)
        if not (self.warm and bool(known.any())):
            return guess
        kept: Guess = state.kept.get(ids).guess
        return tree_map(lambda new, old: torch.where(known.view(-1, *[1] * (new.ndim - 1)), old, new), guess, kept)

    def report(self, problem: Problem, before: Unstaling, state: Unstaling, arrivals: Arrivals) -> Report:
        return self.inner.report(problem, before.inner, state.inner, state.seen) | state.told
