"""Parameter-efficient methods: small trained modules hung under a frozen base (design idea 4).

    settings.py      the registry: every method and preset, and the learning rate that suits it
    kinds.py         what a recipe can say about each, checked by checks.py; these three import no torch
    delta.py         Delta, what hangs under a module, and Plan
    hub.py           how deltas act: which adapters, stacked, averaged, or one for each tree
    base.py          the verbs: attach, off, swapped, state, merge, ...
    targets.py       which modules a method is hung under
    folder.py        an adapter folder, written and read; peft_format.py and peft_lora.py keep PEFT's format
    combine.py       several LoRAs into one

    lora.py          Hu et al. 2021            bottleneck.py    Houlsby et al. 2019, Pfeiffer, He et al.
    dora.py          Liu et al. 2024           compacter.py     Karimi Mahabadi et al. 2021
    lora_starts.py   PiSSA, OLoRA              ia3.py           Liu et al. 2022
    experts.py       LoRA on bare parameters   prompt.py        Lester et al. 2021
    vera.py          Kopiczko et al. 2024      prefix.py        Li and Liang 2021
    copies.py        the base's own tensors:   bitfit.py, layer_norms.py, top_layers.py

A new method is one file with a Delta and a ``build``, its settings in kinds.py and one registry line in settings.py.
"""

from trivium.peft.kinds import BottleneckSettings, FullSettings, LoRASettings, Settings
from trivium.peft.settings import METHODS, settings_for

__all__ = ["METHODS", "BottleneckSettings", "FullSettings", "LoRASettings", "Settings", "settings_for"]
