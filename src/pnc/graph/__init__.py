"""A network recorded as a verified graph, and where it can be cut. Start with `recording`."""
