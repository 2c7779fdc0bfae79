"""gRPC: sessions with the coordinator, and interceptors; synchronous and asyncio."""
