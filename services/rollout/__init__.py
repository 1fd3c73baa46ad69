"""The rollout service: replicas that take leases, run episodes on a vLLM engine and emit trajectories."""
