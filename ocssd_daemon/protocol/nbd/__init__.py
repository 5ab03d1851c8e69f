"""NBD: the wire format and the negotiation, without I/O."""
