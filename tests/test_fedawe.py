"""FedAWE: four rounds by hand, and FedAvg where everybody is always there."""

import numpy as np
import pytest
from toy import Listed, close, jumpers, path, problem_of

from fedsim.local import Sgd
from strategies.fedavg import FedAvg
from strategies.fedawe import FedAWE

JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # of two-dimensional jumpers
TARGETS = [[1, 0], [0, 3], [2, 2]]
SCRIPT = ((0, 1), (1,), (), (1, 2), (0, 2))


@pytest.mark.parametrize("mode", ["vmap", "loop"])
def test_five_rounds_one_of_them_empty_by_hand(mode):
    """The numbers come from

    import numpy as np
    target, w = np.array([[1., 0.], [0., 3.], [2., 2.]]), np.zeros(2)
    x, tau = np.zeros((3, 2)), [-1, -1, -1]
    for t, S in enumerate(([0, 1], [1], [], [1, 2], [0, 2])):
        if S:
            w = np.mean([x[i] + 0.25 * (t - tau[i]) * (target[i] - x[i]) for i in S], axis=0)
        for i in S:
            x[i], tau[i] = w, t
        print(w.round(8))
    """
    expected = [[0.125, 0.375], [0.09375, 1.03125], [0.09375, 1.03125], [1.0234375, 2.0078125], [1.13378906, 1.00292969]]
    close(path(FedAWE(JUMP, server_lr=0.25), jumpers(TARGETS), 5, participation=Listed(SCRIPT), mode=mode), expected)


def test_under_full_participation_it_is_fedavg():
    random = np.random.default_rng(0)
    toy = problem_of([random.normal(size=(4 + i, 3)) for i in range(5)], [random.normal(size=4 + i) for i in range(5)])
    local = Sgd(lr=0.1, epochs=2, batch_size=3)
    close(path(FedAWE(local), toy, 6), path(FedAvg(local, weights="uniform"), toy, 6), within=1e-12)
