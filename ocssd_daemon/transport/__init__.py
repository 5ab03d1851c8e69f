"""The sockets: accept, negotiate and hand file descriptors to the reactor."""
