"""The coordinator as a service: engine, sessions, configuration, server."""
