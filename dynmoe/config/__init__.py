"""Configuration: its resolvers, and the check that refuses a wrong command before torch loads."""
