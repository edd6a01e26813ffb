"""Writes any source as files that are fast to read at random and hold their media."""
