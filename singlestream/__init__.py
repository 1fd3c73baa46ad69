"""What the four services share: contracts, streams, clients, config, errors, telemetry and the command line."""
