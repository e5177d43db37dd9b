"""An attack on membership: plain without privacy, and within what epsilon allows with it."""

import math

import pytest
import torch
from bench.private import advantages


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


def test_the_attack_sees_who_was_trained_on_without_privacy():
    """Two hundred examples with random labels are learned by heart; the same number were left out."""
    advantage, bound, _ = advantages(math.inf, 1, rounds=10)
    assert advantage > 0.5
    assert bound == 1.0


def test_with_privacy_it_stays_within_what_epsilon_allows():
    """Advantage <= (e^eps - 1 + 2 delta) / (e^eps + 1), and 5 deviations of two shares of a hundred: 5 sqrt(2 / 400) = 0.36."""
    advantage, bound, _ = advantages(0.5, 1, rounds=10)
    assert bound == pytest.approx(math.tanh(0.25), rel=0.01)
    assert advantage < 0.36  # what chance alone may give, were nothing learned at all
    assert advantage < bound + 0.36
