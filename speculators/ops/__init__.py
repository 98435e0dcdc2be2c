"""Single operations that torch does slowly: `cpu` has them as loops in C++, compiled on this machine.

Drafts, training and stages import `cpu`; whoever calls has the same in torch's operations, for when it says None.
"""
