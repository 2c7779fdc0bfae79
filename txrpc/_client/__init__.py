"""One process's side of transactions: the manager, its branches, and how they end."""
