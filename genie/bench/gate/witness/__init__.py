"""A folder for PYTHONPATH: it holds a ``sitecustomize`` and nothing that anybody imports from here."""
