"""Rows of any usual file become examples: readers, formats, chat templates, token weights, the order of a run."""
