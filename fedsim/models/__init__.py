"""F3. The zoo of networks, and how one becomes a pure function: see README.md.

Importing this package registers every model. `realise` builds one; `loops`, `vmappable` and `chain_of` say how clients may be executed.
"""

from fedsim.models import (  # noqa: F401  (imported to register)
    attention,
    convolution,
    dense,
    factors,
    huggingface,
    lora,
    prefix,
    python,
    recurrent,
    residual,
)
from fedsim.models.adapt import Adapt, Fitted, trained
from fedsim.models.chain import Link, chain_of, matrix, unshared
from fedsim.models.dropout import Dropout
from fedsim.models.model import Model, realise
from fedsim.models.surgery import loops, vmappable

__all__ = ["Adapt", "Dropout", "Fitted", "Link", "Model", "chain_of", "loops", "matrix", "realise", "trained", "unshared", "vmappable"]
