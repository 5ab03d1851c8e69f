"""The benchmark: every number of ours beside its peer's, from one run on one machine with one client.

Not part of the installed package. ``python -m bench`` needs gcc, qemu-storage-daemon, nbdkit, nbdcopy and
fio; what is missing becomes a row that says so.
"""
