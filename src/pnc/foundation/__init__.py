"""Errors, names, bits, files and processes: nothing about cloning. Start with `errors`."""
