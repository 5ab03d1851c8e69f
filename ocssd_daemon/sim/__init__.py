"""Experiments in virtual time on the daemon's own flash and FTL: workloads, traces, results, sweeps."""
