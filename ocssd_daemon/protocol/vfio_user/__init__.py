"""vfio-user: a PCI device on a Unix socket. ``wire`` lays the messages out, ``session`` is the server's
state machine.
"""
