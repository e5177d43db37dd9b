"""MIFA: four rounds by hand, waiting, and what it reduces to."""

import numpy as np
from toy import Listed, close, jumpers, path, problem_of

from fedsim.local import Sgd
from strategies.fedavg import FedAvg
from strategies.mifa import Mifa

JUMP = Sgd(lr=2.0, steps=1, batch_size=None)  # of two-dimensional jumpers
TARGETS = [[1, 0], [0, 3], [2, 2]]
SCRIPT = ((0, 1), (1,), (2,), (0, 2))


def test_four_rounds_by_hand():
    """The numbers come from

    import numpy as np
    target, w, h = np.array([[1., 0.], [0., 3.], [2., 2.]]), np.zeros(2), np.zeros((3, 2))
    for S in ([0, 1], [1], [2], [0, 2]):
        h[S] = target[S] - w
        w = w + 0.5 * h.mean(0)
        print(w.round(8))
    """
    expected = [[0.16666667, 0.5], [0.30555556, 0.91666667], [0.72685185, 1.51388889], [0.95679012, 1.75925926]]
    close(path(Mifa(JUMP, server_lr=0.5), jumpers(TARGETS), 4, participation=Listed(SCRIPT)), expected)


def test_with_wait_nothing_moves_before_everybody_was_heard_of():
    models = path(Mifa(JUMP, wait=True), jumpers(TARGETS), 4, participation=Listed(SCRIPT))
    close(models[:2], np.zeros((2, 2)))
    close(models[2], [1, 5 / 3])  # the mean of all targets: nobody moved yet


def test_wait_does_not_wait_for_who_has_no_data():
    xs, ys = [np.eye(2), np.eye(2), np.zeros((0, 2))], [[1, 0], [0, 1], []]
    models = path(Mifa(JUMP, wait=True), problem_of(xs, ys), 1)
    close(models[-1], [1 / 3, 1 / 3])


def test_under_full_participation_it_is_fedavg():
    random = np.random.default_rng(0)
    toy = problem_of([random.normal(size=(4 + i, 3)) for i in range(5)], [random.normal(size=4 + i) for i in range(5)])
    local = Sgd(lr=0.1, epochs=2, batch_size=3)
    close(path(Mifa(local), toy, 6), path(FedAvg(local, weights="uniform"), toy, 6), within=1e-12)
