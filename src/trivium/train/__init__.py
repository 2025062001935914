"""The one loop and what it needs: optimizers, schedules, recomputation, the log."""
