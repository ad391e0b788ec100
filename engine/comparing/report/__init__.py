"""What a person sees of a comparison: the report, its charts, its tables.

Nothing is re-exported here, so that whoever wants one part does not pay for matplotlib and jinja2.
"""
