"""A target and its clones served over HTTP; clones come and go while it runs. Start with `deployment`."""
