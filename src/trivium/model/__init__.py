"""The model: loading and saving, forest attention, log-probabilities, generation, the proofs before training."""
