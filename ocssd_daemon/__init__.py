"""ocssd-daemon: an emulated Open-Channel SSD, served over sockets."""

__version__ = "0.1.0"
