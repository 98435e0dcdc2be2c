"""What each verb of the command line does: one function a verb, from its words to an exit code.

`cli` imports the module of the verb that was asked for, by name; only `run` imports another, `sweep`.
"""
