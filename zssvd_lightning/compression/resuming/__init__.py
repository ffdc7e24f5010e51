"""Runs block by block that go on after they were interrupted."""
