"""trivium: pretraining, supervised fine-tuning and preference tuning in one declared run."""

__version__ = "0.1.0"
