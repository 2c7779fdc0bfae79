"""Protobuf: codec, metadata, status; `v1` is generated."""
