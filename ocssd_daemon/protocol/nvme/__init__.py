"""NVMe and Open-Channel data structures: bytes ↔ named fields. No state, no I/O, no clock.

One module per family: ``status``, ``commands`` (SQE, CQE, the dwords of each command), ``identify``,
``features``, ``logs``, ``ocssd20`` and ``ocssd12``. Field names are the specification's, in lower case.
"""
