"""A whole decoder on a processor: compiled steps, its own threads, weights mapped from disk."""
