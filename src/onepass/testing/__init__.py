"""What tests, benchmarks and `onepass check` share: error budget, guarded inputs, peak memory, planted faults."""
