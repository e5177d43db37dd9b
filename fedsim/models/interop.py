"""F3. Adapters as PEFT keeps them: a folder with `adapter_model.safetensors` and `adapter_config.json`.

Names differ by a prefix and by kind of layer; numbers and shapes are the same, but that a convolution's B has a kernel of 1 there.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

from torch import Tensor, nn

from fedsim.errors import ScenarioError
from fedsim.lowrank import MAGNITUDE, A, B
from fedsim.params import Params

if TYPE_CHECKING:
    from fedsim.models.lora import Lora

PREFIX = "base_model.model."
WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


def save_adapter(folder: Path, lora: Lora, module: nn.Module, whole: Params) -> None:
    """Write the adapters in `whole` so that PEFT loads them onto the network without adapters."""
    from safetensors.torch import save_file

    kinds = _kinds(module)
    also = sorted({name.rpartition(".")[0] for name in _also(lora, module, whole)})
    tensors = {
        _there(name, kinds): _shaped(value, name, kinds).detach().cpu().contiguous() for name, value in _own(lora, module, whole).items()
    }
    config = {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": None,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.scaling == "rank-stabilised",
        "use_dora": lora.dora,
        "target_modules": sorted(kinds),
        "modules_to_save": also or None,
        "bias": "none",
        "inference_mode": True,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / WEIGHTS)
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def load_adapter(folder: Path, lora: Lora, module: nn.Module, whole: Params) -> Params:
    """`whole` with the adapters of a folder in it. Raises ScenarioError where they are not these adapters."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        config = json.loads((folder / CONFIG).read_bytes())
        there = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise ScenarioError("model.adapt.start", f"{folder} holds no adapter ({WEIGHTS}, {CONFIG}): {error}") from None
    ours = {"r": lora.rank, "lora_alpha": lora.alpha, "use_dora": lora.dora, "use_rslora": lora.scaling == "rank-stabilised"}
    differ = [f"{key} is {config.get(key, False)} there and {value} here" for key, value in ours.items() if config.get(key, False) != value]
    if differ:
        raise ScenarioError("model.adapt.start", f"the adapter in {folder} is another: {'; '.join(differ)}")
    kinds, found = _kinds(module), {}
    for name, value in _own(lora, module, whole).items():
        stored = there.pop(_there(name, kinds), None)
        if stored is None or stored.numel() != value.numel():
            have = "none" if stored is None else list(stored.shape)
            raise ScenarioError("model.adapt.start", f"'{name}' should be {list(value.shape)}, and the adapter in {folder} has {have}")
        found[name] = stored.view(value.shape).to(value)
    if there:
        raise ScenarioError("model.adapt.start", f"the adapter in {folder} also has '{min(there)}', which nothing here is adapted by")
    return whole | Params(found)


def _own(lora: Lora, module: nn.Module, whole: Params) -> Params:
    """Everything that an adapter file holds: both factors, magnitudes, and layers trained whole."""
    ends = (f".{A}", f".{B}", f".{MAGNITUDE}")
    return Params({name: v for name, v in whole.items() if name.endswith(ends) or name in _also(lora, module, whole)})


def _also(lora: Lora, module: nn.Module, whole: Params) -> list[str]:
    return [name for layer in lora.wholly(module) for name in whole if name.rpartition(".")[0] == layer]


def _kinds(module: nn.Module) -> dict[str, int]:
    """The adapted layers, and the dimensions of their kernels: 0 = linear, 1 to 3 = convolutions, -1 = embeddings."""
    from fedsim.models.lora import Adapted

    found = ((name, part) for name, part in module.named_modules() if isinstance(part, Adapted))
    return {name: -1 if part.tokens else part.weight.ndim - 2 for name, part in found}


def _there(name: str, kinds: dict[str, int]) -> str:
    """PEFT's name of one of our tensors."""
    layer, _, part = name.rpartition(".")
    if part == MAGNITUDE:
        return f"{PREFIX}{layer}.lora_magnitude_vector"
    if part not in (A, B):
        return f"{PREFIX}{name}"
    return f"{PREFIX}{layer}.lora_embedding_{part[-1]}" if kinds[layer] < 0 else f"{PREFIX}{name}.weight"


def _shaped(value: Tensor, name: str, kinds: dict[str, int]) -> Tensor:
    """The tensor in PEFT's shape."""
    layer, _, part = name.rpartition(".")
    if part == B and kinds[layer] > 0:
        return value.reshape(*value.shape, *[1] * kinds[layer])
    return value
