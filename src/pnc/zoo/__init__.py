"""A folder of networks, and which of them to clone classes from. Start with `rank`."""
