"""``txrpc bench``: what txrpc would cost on the user's own databases.

A transfer between two services, each with one of the databases: one UPDATE and one INSERT a side.  In turns the services commit
alone, as they do without a transaction manager, and in transactions.  Customers, services and a coordinator are processes here.
"""

from txrpc.cli.bench.command import bench

__all__ = ["bench"]
