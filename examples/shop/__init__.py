"""A shop of three asyncio services: an order reaches the third through the second, and all of it is one transaction."""
