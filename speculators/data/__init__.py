"""Conversations, to token ids: sources, templates, token tables and how rows are packed.

Stages import the modules; features build on `token_table` and `packing`, never the other way.
"""
