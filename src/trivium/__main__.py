"""``python -m trivium``, and what torchrun starts: ``torchrun --nproc_per_node 2 -m trivium run recipe.yaml``."""

from trivium.cli.main import main

if __name__ == "__main__":
    main()
