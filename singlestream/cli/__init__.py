"""The `singlestream` command."""
