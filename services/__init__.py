"""The four services. Each folder is one process; none imports another."""
