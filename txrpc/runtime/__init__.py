"""A process's side of transactions: managers, handles, scopes."""
