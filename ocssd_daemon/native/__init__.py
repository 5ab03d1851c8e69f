"""C-level headers of the hot path (Cython .pxd files); nothing to import from Python."""
