"""First-order compensation: a stale change is corrected by the diagonal of its own outer product, times how far the model has moved since.

Zheng, Meng, Wang, Chen, Yu, Ma, Liu, "Asynchronous Stochastic Gradient Descent with Delay Compensation" (DC-ASGD), ICML 2017
(arXiv 1609.08326); for changes of several local steps as in Wang and Gao, AAAI 2025 (arXiv 2309.13536), where it is a baseline.

    client i:  Delta_i = local(w_{t-tau}) - w_{t-tau}
    server:    Delta_i <- Delta_i - lam * Delta_i * Delta_i * (w_t - w_{t-tau})        elementwise; then `inner` has it

A change that is not stale is let through as it is.

Differs: DC-ASGD compensates a gradient g = -Delta / lr. Expressed by it, the term is (lam / lr) Delta^2; lam = 4 applied to Delta^2 is the
AAAI paper's baseline as coded. Its adaptive form (lam over a running root mean square) is left out. Staleness is still told to `inner`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

from annotated_types import Ge

from fedsim.params import Params
from fedsim.problem import Problem
from fedsim.registry import register
from fedsim.rng import Key
from fedsim.strategy import Strategy
from fedsim.tree import put
from fedsim.types import Updates
from fedsim.wrapper import Wrapper


def compensate(change: Params, started: Params, w: Params, lam: float) -> Params:
    """Changes made to `started`, as if made to `w`, to first order. `change` and `started` are stacked `[C, ...]`, `w` is not."""
    return change - lam * (change * change * (w - started))


@register("dc-asgd")
@dataclass(frozen=True)
class DcAsgd(Wrapper):
    """Correct stale changes to first order before an inner strategy has them (DC-ASGD: Zheng et al., ICML 2017)."""

    recalls: ClassVar[bool] = True

    inner: Strategy
    lam: Annotated[float, Ge(0)] = 4.0

    def server(self, problem: Problem, state: Any, updates: Updates, key: Key) -> Any:
        stale = (updates.arrivals.staleness > 0).nonzero()[:, 0]  # [U]
        if len(stale):
            late = updates.take(stale)
            changes = compensate(late.payload, late.started, self.inside(state).w, self.lam)
            updates = replace(updates, payload=put(updates.payload, stale, changes))
        return self.inner.server(problem, state, updates, key)
