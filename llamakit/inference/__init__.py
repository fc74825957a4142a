"""Running the model forward: sampling and text completion. Nothing is imported here, so that `--help` stays fast."""
