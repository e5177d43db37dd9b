"""F3. Transformers of the Hugging Face library, and PEFT's adapters on them. Needs `pip install '.[peft]'`.

Attention is `eager`, because fused kernels have no batching rule over clients and examples, and dropout is off, because it is drawn inside
of functions where no key reaches. Weights are read from safetensors; nothing is unpickled and no code of a repository is run.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from fedsim.errors import ScenarioError
from fedsim.models.adapt import Adapt, Fitted
from fedsim.models.dropout import draws_of, key_dropouts
from fedsim.models.model import Model
from fedsim.params import Params
from fedsim.registry import register
from fedsim.rng import Key


class Answers(nn.Module):
    """A Hugging Face model as a function of tokens: its logits. `[B, T] -> [B, outputs]` or `[B, T, outputs]`."""

    def __init__(self, model: nn.Module, padding: int, causal: bool):
        super().__init__()
        self.model = model
        self.padding = padding
        self.causal = causal

    def forward(self, tokens: Tensor) -> Tensor:
        # The mask is made here, as numbers to be added: the library's own way looks at the values of a mask, which no vmap allows.
        blocked = (tokens == self.padding)[:, None, None, :].expand(-1, 1, tokens.shape[1], -1)  # [B, 1, T, T]
        if self.causal:
            steps = torch.arange(tokens.shape[1], device=tokens.device)
            blocked = blocked | (steps[None, :] > steps[:, None])
        dtype = next(self.model.parameters()).dtype
        mask = torch.zeros(blocked.shape, dtype=dtype, device=tokens.device).masked_fill(blocked, torch.finfo(dtype).min)
        logits: Tensor = self.model(input_ids=tokens, attention_mask=mask).logits
        return logits


@register("huggingface")
@dataclass(frozen=True)
class HuggingFaceModel(Model):
    """A transformer of the Hugging Face library: pre-trained from `path` (a folder or a name of the hub), or new from `config`.

    config: what its configuration says (`model_type: gpt2`, ...); with `path`, what is changed of it.
    head: classification = one answer a text; causal = the next token at each position, over the data's vocabulary.
    """

    inputs: ClassVar[frozenset[str]] = frozenset()  # tokens, but one answer or one at each position
    path: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    head: Literal["classification", "causal"] = "classification"

    def __post_init__(self) -> None:
        if self.path is None and "model_type" not in self.config:
            raise ValueError("give `path`, or a `config` with model_type, e.g. {model_type: gpt2, n_embd: 64, n_layer: 2, n_head: 4}")

    def build(self, shape: tuple[int, ...], outputs: int, vocabulary: int | None) -> nn.Module:
        if vocabulary is None or len(shape) != 1:
            raise ScenarioError("model", f"'huggingface' reads tokens, and these examples are {list(shape)}; take a source of texts")
        transformers = _library("transformers")
        causal = self.head == "causal"
        auto = transformers.AutoModelForCausalLM if causal else transformers.AutoModelForSequenceClassification
        fitting = {} if causal else {"num_labels": outputs}
        try:
            config = self._configuration(transformers, {"vocab_size": vocabulary, "pad_token_id": 0} if self.path is None else {}, fitting)
            if config.vocab_size < vocabulary:
                message = f"knows {config.vocab_size} tokens, and the data have {vocabulary}; lower data.source.vocabulary"
                raise ScenarioError("model.path", message)
            options = {"attn_implementation": "eager"}
            if self.path is None:
                model = auto.from_config(config, **options)
            else:
                model = auto.from_pretrained(self.path, config=config, use_safetensors=True, trust_remote_code=False, **options)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            where = "model.path" if self.path is not None else "model.config"
            raise ScenarioError(where, f"cannot be loaded: {type(error).__name__}: {str(error).splitlines()[0]}") from error
        padding = config.pad_token_id if config.pad_token_id is not None else 0
        tokens = torch.arange(2 * shape[0]).view(2, -1) % vocabulary
        return _same_answers(model.float(), padding, torch.where(tokens == padding, (padding + 1) % vocabulary, tokens))

    def _configuration(self, transformers: Any, defaults: dict[str, Any], fitting: dict[str, Any]) -> Any:
        if self.path is not None:
            config = transformers.AutoConfig.from_pretrained(self.path, trust_remote_code=False, **self.config, **fitting)
        else:
            config = transformers.AutoConfig.for_model(**(defaults | self.config | fitting))
        for name, value in vars(config).items():
            if ("drop" in name or name.endswith("pdrop")) and isinstance(value, float):
                setattr(config, name, 0.0)
        config.use_cache = False
        return config


@register("peft")
@dataclass(frozen=True)
class Peft(Adapt):
    """An adapter of the PEFT library, which also knows layers of Hugging Face models that `lora` does not (GPT-2's `Conv1D`).

    config: what its configuration says: `{peft_type: LORA, r: 8, lora_alpha: 16, target_modules: [c_attn]}`, or IA3, LOHA, LOKR, ...
    """

    config: dict[str, Any] = field(default_factory=dict)
    merge: bool = False

    def fit(self, module: nn.Module, w: Params, x: Tensor, key: Key) -> Fitted:
        peft = _library("peft")
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(key & (2**63 - 1))
            try:
                config = peft.get_peft_config({"peft_type": "LORA"} | self.config)
                peft.inject_adapter_in_model(config, module)
            except (ValueError, KeyError, TypeError) as error:
                raise ScenarioError("model.adapt.config", f"PEFT refuses it: {str(error).splitlines()[0]}") from error
        key_dropouts(module)
        module.eval()
        trained = tuple(name for name, p in module.named_parameters() if p.requires_grad)
        module.requires_grad_(False)
        whole = Params({name: p.detach().clone() for name, p in module.named_parameters()})
        draws = draws_of(module, lambda: module(x))
        return Fitted(whole, trained, draws)

    def merged(self, module: nn.Module, whole: Params) -> Params:
        from copy import deepcopy

        tuners = _library("peft.tuners.tuners_utils")
        filled = deepcopy(module)
        filled.load_state_dict(dict(whole), strict=False)
        merged: dict[str, Tensor] = {}
        for name, part in filled.named_modules():
            if isinstance(part, tuners.BaseTunerLayer):
                part.merge()
                base = part.get_base_layer()
                merged |= {f"{name}.{k}": p.detach().clone() for k, p in base.named_parameters(recurse=False)}
        inside = {f"{name}." for name, part in filled.named_modules() if isinstance(part, tuners.BaseTunerLayer)}
        rest = {name: p for name, p in whole.items() if not any(name.startswith(prefix) for prefix in inside)}
        return Params(rest | merged)


def _same_answers(model: nn.Module, padding: int, tokens: Tensor) -> Answers:
    """The model with the mask that answers as its own does: of a decoder, tokens only see what came before.

    Raises ScenarioError where neither does.
    """
    model.eval()
    with torch.no_grad():
        own = model(input_ids=tokens).logits
        for causal in (True, False):
            answers = Answers(model, padding, causal)
            if torch.allclose(answers(tokens), own, rtol=1e-3, atol=1e-4):
                return answers
    raise ScenarioError(
        "model.path", "attends in a way that is neither causal nor to all tokens alike, which cannot be batched over clients"
    )


def _library(name: str) -> Any:
    import importlib

    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise ScenarioError("model", f"needs the library '{name.split('.')[0]}' ({error}); pip install peft transformers") from error
