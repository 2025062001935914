"""Parameter-efficient methods: small trained modules hung under a frozen base (design idea 4).

    settings.py      what a recipe can say about a method, and the registry; imports no torch
    base.py          Delta, attach, and the verbs every method shares: off, swapped, state, merge, ...
    targets.py       which modules a method is hung under
    lora.py          Hu et al. 2021            bottleneck.py    Houlsby et al. 2019, Pfeiffer et al. 2021
    folder.py        an adapter folder, written and read; peft_format.py keeps LoRA's in PEFT's format

A new method is one file with a Delta and a ``build``, and in settings.py its settings and one registry line.
"""

from trivium.peft.kinds import BottleneckSettings, FullSettings, LoRASettings, Settings
from trivium.peft.settings import METHODS, settings_for

__all__ = ["METHODS", "BottleneckSettings", "FullSettings", "LoRASettings", "Settings", "settings_for"]
