"""Data on its way in: sources, conversations, chat templates, packing, shards of hidden states."""
