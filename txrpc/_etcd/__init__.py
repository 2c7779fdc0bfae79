"""A decision log in etcd: several coordinators share it, and it is replicated by etcd itself."""
