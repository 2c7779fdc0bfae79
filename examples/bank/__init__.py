"""Two banks and a teller: a transfer is one transaction over two services and their databases."""
