"""A group of coordinators that keep their decision logs on their own disks, each record on a quorum of them."""
