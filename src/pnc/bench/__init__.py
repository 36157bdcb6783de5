"""Measurements that anyone can run again: each writes what it measured as JSON and as a Markdown table."""
