"""What a person sees of a run: terminal, contact sheet, curves, report, results.

Nothing is re-exported here, so that the trainer, which needs only :mod:`.console` and
:mod:`.grids`, does not pay for importing matplotlib and jinja2.
"""
