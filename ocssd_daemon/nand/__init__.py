"""The NAND array: geometry, layout of its state, and where the state is stored."""
