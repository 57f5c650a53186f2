"""``genie report``: one self-contained HTML page from result files.

The rooms, in the order in which a result passes through them: ``facts`` (a cell's stored figures,
checked), ``series`` (runs that may share a trend line), ``quantiles`` and ``charts`` (what a cell's
samples support, and its pictures), ``tables`` and ``sections`` (what the page says), ``page`` (HTML)
and ``output`` (the file). ``command`` is light; the rest is imported when a report is made.
"""
