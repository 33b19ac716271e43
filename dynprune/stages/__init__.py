"""The stages of a run, each of which makes one kind of artifact out of those before it."""
