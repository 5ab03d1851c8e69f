"""The NVMe controller: registers, admin commands, namespaces. Knows no socket, no PCI bus and no clock.

``controller`` ties the parts together; ``ports`` names what it needs from outside (guest memory, the I/O
queues). I/O commands themselves run in the reactor (``_nvme.pyx``); they never pass through here.
"""
