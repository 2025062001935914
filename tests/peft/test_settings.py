"""What a recipe may say about a method, and what it is told when it says something else."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import fields

import pytest

from trivium.errors import RecipeError
from trivium.peft import METHODS, BottleneckSettings, FullSettings, LoRASettings, settings_for


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
        ("dora", {}, "Methods: bottleneck, full, lora"),
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
        ("bottleneck", {"non_linearity": "tanh"}, "gelu, relu, silu"),
        ("bottleneck", {"placement": "parallel"}, "houlsby, pfeiffer"),
        ("bottleneck", {"placement": ["houlsby"]}, "placement is ['houlsby']"),
        ("bottleneck", {"layer_norms": 1}, "layer_norms is 1"),
    ],
)
def test_mistakes_are_named(name, values, said):
    with pytest.raises(RecipeError) as caught:
        settings_for(name, values)
    assert said in str(caught.value)
    assert "\n" not in caught.value.what


def test_every_setting_has_its_sentence():
    for method in METHODS.values():
        assert all(one.metadata["help"].endswith(".") for one in fields(method.settings))


def test_no_torch_is_imported():
    code = "import sys, trivium.peft; assert not {'torch', 'transformers', 'numpy', 'peft'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
