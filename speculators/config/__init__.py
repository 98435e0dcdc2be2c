"""What a recipe may say, and how words become one.

Both sides of the line import `schema`, `choices`, `algorithms` and `fields`, which need nothing that has to be
installed. Only the runner imports `compose`, the one door to Hydra, `checks`, which refuses values that cannot work,
`foreign_names`, the hints for other tools' options, `composed`, which does without Hydra where it can, and `shipped`,
which knows where recipes lie.
"""
