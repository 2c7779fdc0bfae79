"""gRPC: interceptors and sessions, in two colours."""
