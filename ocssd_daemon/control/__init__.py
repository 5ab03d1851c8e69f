"""The control socket: what an operator asks of a running daemon."""
