"""Command lines: the daemon and its client."""
