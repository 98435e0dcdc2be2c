"""The pipeline: one module a stage, `main(job)` in each. No stage imports another one or the runner.

`head -1 speculators/stages/*.py` reads as the pipeline.
"""
