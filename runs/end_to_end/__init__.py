"""Everything at once: three scenarios as one workload, weights from disk, a searched policy, compression, report and gate."""
