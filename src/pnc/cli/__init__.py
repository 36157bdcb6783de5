"""The `pnc` command. Start with `app`."""
