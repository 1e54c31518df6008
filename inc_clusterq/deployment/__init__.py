"""From the reconstructed graph to what runs on x86: hand-over, explicit clamps, parity, latency."""
