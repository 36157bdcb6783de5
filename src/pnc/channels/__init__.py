"""Which channels can be removed, and the smaller module without them. Start with `channel_spaces`."""
