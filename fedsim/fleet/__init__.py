"""F3. The fleet: who takes part when, how long devices take, and what goes wrong. Importing this package registers every choice."""

from dataclasses import dataclass, field

from fedsim.fleet.channel import Channel, Link
from fedsim.fleet.faults import ARRIVES, LOST, Byzantine, Corruption, Drops, Fates, Faults, Straggle
from fedsim.fleet.latency import Devices, Latency
from fedsim.fleet.modulation import InterleavedSine, Modulation, Sine, Staircase, Steady
from fedsim.fleet.participation import Bernoulli, Cyclic, Full, Markov, Mask, Participation, State, Uniform
from fedsim.fleet.rates import BetaRates, ConstantRate, DataCorrelated, Labels, Listed, Rates, TwoGroups, UniformRange
from fedsim.fleet.spread import Classes, ConstantSpread, DeviceClass, Lognormal, Pareto, Recorded, Spread
from fedsim.fleet.trace import Trace
from fedsim.registry import section


@section
@dataclass(frozen=True)
class Fleet:
    """The scenario's `fleet:` section: how the clients of the population behave.

    participation: who is available when.
    latency: how long devices take, in virtual seconds; nothing takes any time where it is left out.
    faults: what goes wrong.
    channel: noise and losses between server and clients.
    """

    participation: Participation = Full()
    latency: Latency = field(default_factory=Latency)
    faults: Faults = field(default_factory=Faults)
    channel: Channel = field(default_factory=Channel)


__all__ = [
    "ARRIVES",
    "LOST",
    "Bernoulli",
    "BetaRates",
    "Byzantine",
    "Channel",
    "Classes",
    "ConstantRate",
    "ConstantSpread",
    "Corruption",
    "Cyclic",
    "DataCorrelated",
    "DeviceClass",
    "Devices",
    "Drops",
    "Fates",
    "Faults",
    "Fleet",
    "Full",
    "InterleavedSine",
    "Labels",
    "Latency",
    "Link",
    "Listed",
    "Lognormal",
    "Markov",
    "Mask",
    "Modulation",
    "Pareto",
    "Participation",
    "Rates",
    "Recorded",
    "Sine",
    "Spread",
    "Staircase",
    "State",
    "Steady",
    "Straggle",
    "Trace",
    "TwoGroups",
    "Uniform",
    "UniformRange",
]
