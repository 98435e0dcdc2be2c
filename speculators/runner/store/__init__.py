"""Stores artifacts by key: claims, publishing, checks, archives, removal of unused artifacts.

Import `artifacts` for the store itself, as the worker does, `artifact` for one artifact, `archive` and `upkeep` for
the verbs. Of planning, only `key` and `graph` are imported here.
"""
