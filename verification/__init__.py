"""Proofs that anybody can run: a simulator of whole clusters, an explorer of every interleaving, and mutants that both must catch.

Not installed with the library.
"""
