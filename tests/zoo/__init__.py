"""Real architectures of every library with random weights, small enough for a CPU: what any model is tested on."""
