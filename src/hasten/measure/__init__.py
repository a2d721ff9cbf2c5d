"""Time, memory, FLOPs, fidelity, distribution distances, quality, and the report that holds them together."""
