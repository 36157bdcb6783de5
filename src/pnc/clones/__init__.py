"""What a clone is: adapter, part of the source, head, and file. Start with `clone`."""
