"""What there is: artifacts by key, their claims and checks, archives, and what may go.

Import `artifacts` for the store itself, which the worker does too, `artifact` for one entry, `archive` and `upkeep`
for the verbs. Of planning only `key` and `graph` are known here.
"""
