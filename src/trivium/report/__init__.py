"""The report: one page, in one file, of what a run did, what it cost and what came of it."""
