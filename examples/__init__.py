"""Tasks of one's own, to copy (docs/own_task.md)."""
