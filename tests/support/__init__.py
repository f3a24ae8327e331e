"""Stand-ins of services that no test machine has."""
