"""The decision log of one node, agreed on by a quorum of acceptors (Paxos).  Not used yet."""
