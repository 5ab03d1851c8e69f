"""Sans-I/O protocol definitions: bytes to typed messages and back. construct appears only here."""
