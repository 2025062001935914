"""trivium: pretraining, supervised fine-tuning and preference tuning in one declared run."""

import os

__version__ = "0.1.0"

# OpenMP threads that spin while they wait make training some ten times slower as soon as anything else wants the
# cores (measured: 1,900 tokens/s spinning against 20,900 waiting, a tiny model, one busy process per core). Read by
# the OpenMP library when torch is imported, so it must be said before; what is set already stays.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
