"""Load for any OpenAI-compatible server: at a concurrency, at a rate, or as a trace tells. See docs/throughput.md."""
