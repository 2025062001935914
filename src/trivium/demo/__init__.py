"""The embedded demo: a small story world and the recipe that learns it."""
