"""The NVMe controller: identify data, features, logs, admin commands. Knows no transport."""
