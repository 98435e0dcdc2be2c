"""The recipe's schema, and its composition from a command line.

Runner and pipeline import `schema`, `choices`, `algorithms` and `fields`, which need the standard library only. Only
the runner imports `compose`, the only module that imports Hydra, `composed`, its cache, `checks`, which refuses wrong
values, `foreign_names`, hints for other tools' options, and `shipped`, the paths of recipes.
"""
