"""F4. Attacks on what clients send: how much of their data a server could read out of an update."""

from fedsim.audit.likeness import Likeness, compare
from fedsim.audit.sme import Attack, Found, Seen, attack
from fedsim.audit.verdict import METHODS, Audit, audit

__all__ = ["METHODS", "Attack", "Audit", "Found", "Likeness", "Seen", "attack", "audit", "compare"]
