"""What a recipe may say about a method, and what it is told when it says something else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from trivium.errors import RecipeError
from trivium.peft import METHODS, BottleneckSettings, FullSettings, LoRASettings, settings_for
from trivium.peft.settings import PRESETS, as_written, method_of_preset, rate_of, settings_of


def test_values_are_filled_in():
    assert settings_for("full", {}) == FullSettings()
    assert settings_for("lora", {"r": 4, "target_modules": ["q_proj"]}) == LoRASettings(r=4, target_modules=("q_proj",))
    assert settings_for("lora", {"target_modules": "q_proj"}).target_modules == ("q_proj",)
    assert settings_for("lora", {"target_modules": "all-linear"}) == LoRASettings()
    assert settings_for("bottleneck", {"placement": "pfeiffer"}).placement == "pfeiffer"
    assert settings_for("bottleneck", {}) == BottleneckSettings()


@pytest.mark.parametrize(
    ("name", "values", "said"),
    [
        ("lorra", {}, "did you mean 'lora'"),
        ("dorra", {}, "did you mean 'dora'"),
        (["lora"], {}, "there is no method"),
        ("lora", {"rank": 4}, "no setting 'rank'"),
        ("lora", {"target_module": ["q"]}, "did you mean 'target_modules'"),
        ("lora", {4: 4}, "no setting 4"),
        ("full", {"r": 4}, "full has no settings"),
        ("lora", {"r": 0}, "r is 0"),
        ("lora", {"r": True}, "r is True"),
        ("lora", {"r": "16"}, "r is '16'"),
        ("lora", {"r": 2.5}, "r is 2.5"),
        ("lora", {"alpha": 0}, "alpha is 0"),
        ("lora", {"alpha": float("nan")}, "alpha is nan"),
        ("lora", {"alpha": float("inf")}, "alpha is inf"),
        ("lora", {"dropout": 1}, "dropout is 1"),
        ("lora", {"dropout": None}, "dropout is None"),
        ("lora", {"rslora": "yes"}, "rslora is 'yes'"),
        ("lora", {"target_modules": []}, "target_modules is []"),
        ("lora", {"target_modules": None}, "target_modules is None"),
        ("lora", {"target_modules": [3]}, "target_modules is [3]"),
        ("bottleneck", {"non_linearity": "gelo"}, "did you mean 'gelu'"),
        ("bottleneck", {"non_linearity": "sin"}, "gelu, relu, silu, tanh"),
        ("compacter", {"placement": "parallel"}, "houlsby, pfeiffer"),
        ("bottleneck", {"r": 8, "reduction_factor": 4}, "r and reduction_factor do not go together"),
        ("bottleneck", {"scale": 4.0}, "only placement: parallel has a scale"),
        ("bottleneck", {"skip_layers": -1}, "skip_layers is -1"),
        ("lora", {"dora": True, "init_lora_weights": "pissa"}, "dora and init_lora_weights do not go together"),
        ("lora", {"init_lora_weights": "pisa"}, "did you mean 'pissa'"),
        ("lora", {"rank_pattern": {"q_proj": 0}}, "rank_pattern.q_proj is 0"),
        ("lora", {"alpha_pattern": [3]}, "alpha_pattern is [3]"),
        ("lora", {"modules_to_save": []}, "modules_to_save is []"),
        ("lora", {"target_parameters": "x", "dropout": 0.1}, "dropout and target_parameters"),
        ("lora", {"quantize": "nf5"}, "did you mean 'nf4'"),
        ("lora", {"loraplus_lr_ratio": 0}, "loraplus_lr_ratio is 0"),
        ("ia3", {"feedforward_modules": ["x"]}, "without target_modules"),
        ("prompt", {"num_virtual_tokens": 0}, "num_virtual_tokens is 0"),
        ("top_layers", {"layers": 0}, "layers is 0"),
        ("vera", {"d_initial": -1}, "d_initial is -1"),
        ("bottleneck", {"placement": ["houlsby"]}, "placement is ['houlsby']"),
        ("bottleneck", {"layer_norms": 1}, "layer_norms is 1"),
    ],
)
def test_mistakes_are_named(name, values, said):
    with pytest.raises(RecipeError) as caught:
        settings_for(name, values)
    assert said in str(caught.value)
    assert "\n" not in caught.value.what


def test_a_preset_is_what_it_stands_for():
    assert as_written("dora") == {"name": "lora", "dora": True}
    assert as_written({"name": "qlora", "r": 4}) == {"name": "lora", "quantize": "nf4", "r": 4}
    assert settings_of("pfeiffer") == BottleneckSettings(placement="pfeiffer")
    assert settings_of({"name": "qlora", "quantize": "nf4"}).quantize == "nf4"
    with pytest.raises(RecipeError, match="qlora means quantize: nf4"):
        as_written({"name": "qlora", "quantize": "int8"})
    for name in PRESETS:
        settings_of(name)
        assert rate_of(method_of_preset(name)) > 1
    with pytest.raises(RecipeError, match="did you mean 'houlsby'"):
        method_of_preset("houlsbee")


def test_every_setting_has_its_sentence():
    for method in METHODS.values():
        assert all(one.metadata["help"].endswith(".") for one in fields(method.settings))


def test_no_torch_is_imported():
    code = "import sys, trivium.peft; assert not {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
