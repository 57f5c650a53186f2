"""Version of the keys in ``extra_info`` (docs/comparing.md lists them); imports nothing."""

#: raised when a key is added; no key ever changes its meaning
SCHEMA_VERSION = 2
