"""Test kit: the other side of each protocol, and the programs the tests need."""
