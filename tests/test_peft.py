"""Adapters go to PEFT and come back, and Hugging Face models are trained. Nothing is downloaded: networks are tiny and made here."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_lora import SCENARIO, TOKENS, Mixed, fitted, moved, rows_of

from fedsim.errors import ScenarioError
from fedsim.models.interop import load_adapter, save_adapter
from fedsim.models.lora import Lora

peft = pytest.importorskip("peft")

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:peft.*", "ignore::FutureWarning")

VARIANTS = {
    "all kinds": Lora(rank=2, alpha=3.0, targets=("linear", "embedding", "convolution")),
    "rank-stabilised": Lora(rank=2, alpha=3.0, scaling="rank-stabilised"),
    "dora": Lora(rank=2, alpha=3.0, dora=True),
    "head whole": Lora(rank=2, alpha=3.0, targets=("convolution",), also=("fc",)),
}


def plain() -> torch.nn.Module:
    torch.manual_seed(3)
    return Mixed()


@pytest.mark.parametrize("lora", VARIANTS.values(), ids=VARIANTS.keys())
def test_ours_loads_into_peft_and_peft_s_loads_into_ours(lora, tmp_path):
    module, fit, problem = fitted(lora)
    w = moved(fit)
    save_adapter(tmp_path / "ours", lora, module, fit.whole | w)
    theirs = peft.PeftModel.from_pretrained(plain(), tmp_path / "ours").eval()
    torch.testing.assert_close(theirs(TOKENS), problem.output(w, TOKENS), rtol=1e-5, atol=1e-6)
    theirs.save_pretrained(tmp_path / "theirs")
    back = load_adapter(tmp_path / "theirs", lora, module, fit.whole)
    assert all(torch.equal(back[name], w[name]) for name in fit.trained)


def test_another_adapter_is_refused_by_what_differs(tmp_path):
    lora = VARIANTS["all kinds"]
    module, fit, _ = fitted(lora)
    save_adapter(tmp_path / "a", lora, module, fit.whole)
    with pytest.raises(ScenarioError, match=r"model\.adapt\.start: the adapter in .* is another: lora_alpha is 3\.0 there and 5\.0 here"):
        load_adapter(tmp_path / "a", replace(lora, alpha=5.0), module, fit.whole)
    small = Lora(rank=2, alpha=3.0)
    other, other_fit, _ = fitted(small)
    with pytest.raises(ScenarioError, match=r"also has 'base_model\.model\.conv\.lora_A\.weight'"):
        load_adapter(tmp_path / "a", small, other, other_fit.whole)
    with pytest.raises(ScenarioError, match="holds no adapter"):
        load_adapter(tmp_path / "nowhere", lora, module, fit.whole)


def test_a_run_leaves_an_adapter_that_another_run_starts_from(tmp_path):
    (tmp_path / "a").mkdir()
    text = SCENARIO[: SCENARIO.index("phases")] + "strategy: {name: fedavg, local: {name: sgd, lr: 0.3}}\nrounds: 3\n"
    folder, log = rows_of(tmp_path / "a", text=text)
    config = json.loads((folder.path / "adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (3, 6.0, ["1", "3"])
    (tmp_path / "b").mkdir()
    _, again = rows_of(tmp_path / "b", f"model.adapt.start={folder.path / 'adapter'}", text=text, stop=1)
    assert again[0]["test.loss"] == log[-1]["test.loss"]  # same seed, so the same base


def tiny(kind: str) -> dict:
    small = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 64}
    if kind == "gpt2":
        small = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    return {"model_type": kind, **small, "pad_token_id": 0}
