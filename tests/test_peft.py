"""Adapters go to PEFT and come back, and Hugging Face models are trained. Nothing is downloaded: networks are tiny and made here."""

import json
from dataclasses import replace

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


def text_scenario(model: str, source: str) -> str:
    return f"""\
name: adapted
seed: 4
data: {{source: {source}, clients: 4, partition: iid}}
model: {model}
strategy: {{name: fedavg, weights: uniform, local: {{name: dp-sgd, lr: 0.1, noise: 0.5, batch_size: 4, steps: 2}}}}
rounds: 2
evaluate: {{every: 2, batch: 500}}
engine: {{workers: 0}}
"""


BERT = "{{name: huggingface, config: {}, adapt: {}}}"
QUERY_AND_VALUE = 2 * 2 * (16 + 16)  # A and B of rank 2 on two layers of 16 x 16
CHOICES = {
    "bert lora": ("bert", {"name": "lora", "rank": 2, "targets": ["query", "value"], "also": ["classifier"]}, QUERY_AND_VALUE + 2 * 16 + 2),
    "bert peft": ("bert", {"name": "peft", "config": {"r": 2, "target_modules": ["query", "value"]}}, QUERY_AND_VALUE),
    "gpt2 peft": ("gpt2", {"name": "peft", "config": {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True}}, 2 * (16 + 48)),
}


@pytest.mark.parametrize(("kind", "adapt", "size"), CHOICES.values(), ids=CHOICES.keys())
def test_a_hugging_face_model_trains_privately_and_only_adapters_travel(kind, adapt, size, tmp_path):
    text = text_scenario(BERT.format(json.dumps(tiny(kind)), json.dumps(adapt)), "{name: smsspam, vocabulary: 60, length: 6}")
    folder, log = rows_of(tmp_path, text=text)
    assert log[-1]["bytes_up"] == 4 * 4 * size
    assert log[-1]["privacy.epsilon"] > 0
    assert log[-1]["test.loss"] != log[0]["test.loss"]
    assert (folder.path / "adapter").exists() == (adapt["name"] == "lora")


def test_a_folder_of_a_pretrained_model_is_read_and_pefts_merge_answers_the_same(tmp_path):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(**tiny("bert"), vocab_size=60, num_labels=2)
    transformers.AutoModelForSequenceClassification.from_config(config).save_pretrained(tmp_path / "model")
    adapt = {"name": "peft", "config": {"r": 2, "target_modules": ["query"]}, "merge": True}
    model = f"{{name: huggingface, path: {tmp_path / 'model'}, adapt: {json.dumps(adapt)}}}"
    folder, log = rows_of(tmp_path, text=text_scenario(model, "{name: smsspam, vocabulary: 60, length: 6}"))
    from safetensors.torch import load_file

    merged = load_file(folder.path / "model.safetensors")
    there = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model", attn_implementation="eager").eval()
    assert {f"model.{name}" for name, _ in there.named_parameters()} == set(merged)
    there.load_state_dict({name.removeprefix("model."): v for name, v in merged.items()}, strict=False)
    from test_lora import world_of

    _, world = world_of(tmp_path, text=text_scenario(model, "{name: smsspam, vocabulary: 60, length: 6}"))
    x, y = world.data.test_x, world.data.test_y
    with torch.no_grad():
        loss = torch.nn.functional.cross_entropy(there(input_ids=x, attention_mask=(x != 0).long()).logits, y)
    assert float(loss) == pytest.approx(log[-1]["test.loss"], abs=1e-4)


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{name: huggingface}", "give `path`, or a `config` with model_type"),
        ("{name: huggingface, config: {model_type: gtp2}}", "model.config: cannot be loaded"),
        ("{name: huggingface, path: /nowhere/at/all}", "model.path: cannot be loaded"),
        (BERT.format(json.dumps(tiny("bert")), "{name: peft, config: {target_modules: [nothing]}}"), "model.adapt.config: PEFT refuses it"),
    ],
)
def test_what_cannot_be_made_is_said(model, message, tmp_path):
    from test_lora import world_of

    from fedsim.errors import FedsimError

    with pytest.raises(FedsimError) as caught:
        world_of(tmp_path, text=text_scenario(model, "{name: smsspam, vocabulary: 60, length: 6}"))
    assert message in str(caught.value)
