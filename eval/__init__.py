"""Is it still the same model, and how fast: accuracy, fidelity, throughput, comparison, the gate, the report."""
