"""The control socket: what an operator asks of a running daemon.

``schema`` says what can be asked, ``server`` answers it. The client imports ``schema`` alone, so this file
imports nothing.
"""
