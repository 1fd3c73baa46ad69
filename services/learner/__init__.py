"""The learner: reads trajectories in stream order, takes one optimizer step a batch, publishes each version."""
