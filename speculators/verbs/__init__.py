"""The verbs of the command line: one function per verb, which takes its arguments and returns an exit code.

`cli` imports only the module of the requested verb; `run` imports `sweep` for `-m`.
"""
