"""What a clone is: adapter, part of the source, head, and its file. Start with `clone`."""
